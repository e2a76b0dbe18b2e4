"""How long does a kept table of teacher probabilities take to join, and how much memory?

usage: python bench/teachers.py [--rows 1150000] [--teachers 3]
The rows stand in another order than the table. Memory is the process's peak, with the imports and the rows."""
import argparse, tempfile
import numpy as np
import pandas as pd
from common import median_seconds, report, timed
from competition_kit.core import peak_memory
from competition_kit.teach import Teacher, read_teachers, write_teachers

def rows_of(n): # ids like a competition's, and teachers with three options
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(dict(id=[f'{i:016x}' for i in rng.permutation(n)]))
    return rows, rng

def made_up(k, n, rng):
    p = rng.dirichlet([1, 1, 1], n).astype(np.float32)
    return Teacher(f'teacher{k}', p, rng.integers(0, 2, n).astype(np.int8))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--rows', type=int, default=1_150_000)
    p.add_argument('--teachers', type=int, default=3)
    a = p.parse_args()
    rows, rng = rows_of(a.rows)
    before = peak_memory()
    with tempfile.TemporaryDirectory() as d:
        file = f'{d}/teachers.parquet'
        teachers = [made_up(k, a.rows, rng) for k in range(a.teachers)]
        _, writing = timed(write_teachers, file, teachers, rows)
        order = rng.permutation(a.rows)
        first = teachers[-1].p[order]
        del teachers
        wanted = rows.iloc[order].reset_index(drop=True)
        assert np.array_equal(read_teachers(file, wanted)[-1].p, first)
        joining = median_seconds(lambda: read_teachers(file, wanted))
    report('pyarrow', 'pandas', rows=a.rows, columns=3*a.teachers, write_s=writing, join_s=joining,
           peak_gib=peak_memory(), rows_gib=before)
