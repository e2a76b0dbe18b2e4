"Render the site into _docs/: nbdev makes the pages, then Quarto renders them, or smalldocs where there is no Quarto."
import json, re, shutil, subprocess, sys, tempfile
from pathlib import Path
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parents[1]
nbs, pages, site = root/'nbs', root/'_proc', root/'_docs'

def title(path):
    "The heading of a notebook"
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] != 'markdown': continue
        if found := re.match(r'# (.+)', ''.join(cell['source'])): return found[1].strip()
    return path.stem

def entry(path):
    "A line of the sidebar: the notebook's number and its heading"
    number = path.stem.partition('_')[0]
    return dict(text=f'{number} {title(path)}', href=path.relative_to(nbs).as_posix())

def sidebar():
    "One section a floor, in the order of the numbers"
    floors = {'Stages': nbs, 'Library': nbs/'lib'}
    sections = [dict(section=name, contents=[entry(p) for p in sorted(folder.glob('[0-9]*.ipynb'))])
                for name, folder in floors.items()]
    contents = [dict(text='Overview', href='index.ipynb'), *sections]
    return dict(website=dict(sidebar=dict(contents=contents)))

def without_number(path): return path.with_name(path.name.partition('_')[2])

def render_with_smalldocs():
    "smalldocs reads no `output-file`: the pages take the names to which nbdev's links lead"
    text = (pages/'sidebar.yml').read_text(encoding='utf-8')
    for page in sorted(pages.rglob('[0-9]*.ipynb')):
        page.rename(without_number(page))
        here = page.relative_to(pages)
        text = text.replace(f'href: {here.as_posix()}', f'href: {without_number(here).as_posix()}')
    (pages/'sidebar.yml').write_text(text, encoding='utf-8')
    subprocess.run([sys.executable, '-c', 'from smalldocs.cli import main; main()', 'render', str(pages)], check=True)

def only_exported_cells_run(source):
    "The pages need the exported cells alone; an example or a stage's driver must not run while they are made"
    for path in source.rglob('*.ipynb'):
        book = json.loads(path.read_text(encoding='utf-8'))
        for cell in book['cells']:
            text = ''.join(cell['source'])
            if cell['cell_type'] == 'code' and '#| export' not in text and 'show_doc(' not in text:
                cell['source'] = '#| eval: false\n'+text
        path.write_text(json.dumps(book), encoding='utf-8')

def plain_signatures(text):
    "nbdev writes links into the comments of a signature, a code block that does not show them as links"
    def plain(line): return re.sub(r'\[(`\w+`)\]\([^)]*\)', r'\1', line[0])
    return re.sub(r'^ *"(?:    |\)->).*# .*$', plain, text, flags=re.M)

def links_stay_on_the_site():
    """nbdev's links name the host of the site; written from page to page they work from any folder.
    A private name has no anchor and stays plain code; a method's link leads to its class."""
    config = get_config()
    host = f"{config.doc_host}{config.doc_baseurl}/"
    for page in pages.rglob('*.ipynb'):
        text = plain_signatures(page.read_text(encoding='utf-8'))
        text = re.sub(r'\[(`_\w+`)\]\([^)]*\)', r'\1', text)
        text = re.sub(r'(\.html#\w+)\.\w+\)', r'\1)', text)
        up = '../'*len(page.relative_to(pages).parent.parts)
        page.write_text(text.replace(host, up), encoding='utf-8')

def main():
    refresh_quarto_yml()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)/'nbs'
        shutil.copytree(nbs, source, ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
        only_exported_cells_run(source)
        proc_nbs(source, n_workers=0, force=True)
    links_stay_on_the_site()
    for name in ('nbdev.yml', 'styles.css'): shutil.copy(nbs/name, pages/name)
    if (nbs/'images').exists(): shutil.copytree(nbs/'images', pages/'images', dirs_exist_ok=True)
    text = yaml.safe_dump(sidebar(), sort_keys=False, allow_unicode=True)
    (pages/'sidebar.yml').write_text(text, encoding='utf-8')
    if shutil.which('quarto'): subprocess.run(['quarto', 'render', str(pages), '--no-execute'], check=True)
    else: render_with_smalldocs()
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(pages/'_docs', site)

if __name__ == '__main__': main()
