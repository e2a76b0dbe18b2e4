"Make README.md from nbs/index.ipynb; with --check, only say whether it is up to date."
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parents[1]
nb = nbformat.read(root/'nbs/index.ipynb', 4)
nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
nb.metadata['language_info'] = {'name': 'python'}
text, _ = MarkdownExporter(exclude_output_prompt=True).from_notebook_node(nb)
text = re.sub(r'<style scoped>.*?</style>\n', '', text, flags=re.S)
text = text.replace('](images/', '](nbs/images/')
body = '\n'.join(l.rstrip() for l in text.splitlines()).strip()
text = f'<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->\n\n{body}\n'
readme = root/'README.md'
if '--check' in sys.argv:
    same = readme.read_text(encoding='utf-8') == text
    sys.exit(None if same else 'README.md is not what nbs/index.ipynb makes: run `make readme`')
readme.write_text(text, encoding='utf-8')
