"How long `ck run` takes beside papermill for the same notebook, alternating. Usage: python bench/run.py [REPEATS]"

import os, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat


def compare(folder, repeats):  # Seconds of papermill, seconds of ck
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in ('fold: int = 0', 'print(fold)', 'sum(range(10**6))')],
        metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')),
    )
    nb.cells[0].metadata.tags = ['parameters']
    nbformat.write(nb, folder / 'n.ipynb')
    run = dict(
        papermill=['papermill', 'n.ipynb', 'out.ipynb', '-p', 'fold', '2'],
        ck=['competition_kit.ck', 'run', 'n.ipynb', '-p', 'fold', '2'],
    )
    took = {k: [] for k in run}
    for _ in range(repeats):
        for k, args in run.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, '-m', *args],
                cwd=folder,
                env=dict(os.environ, CK_ROOT=str(folder)),
                check=True,
                capture_output=True,
            )
            took[k].append(time.perf_counter() - start)
    return took['papermill'], took['ck']


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as d:
        papermill, ck = compare(Path(d), int(sys.argv[1]) if len(sys.argv) > 1 else 5)

    def median(o):
        return sorted(o)[len(o) // 2]

    print(
        f'papermill {median(papermill):.2f} s (best {min(papermill):.2f}), '
        f'ck run {median(ck):.2f} s (best {min(ck):.2f}), '
        f'ratio {median(ck) / median(papermill):.2f} (best {min(ck) / min(papermill):.2f})'
    )
