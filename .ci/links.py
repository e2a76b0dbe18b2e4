"Links, anchors and pictures of the site in _docs/ and of README.md that lead nowhere; exit status 1 if there are any."
import re, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

root = Path(__file__).resolve().parents[1]

class Page(HTMLParser):
    "The ids of a page, and the addresses that it refers to"
    def __init__(self, path):
        super().__init__()
        self.ids, self.targets = set(), []
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.targets += [attrs[k] for k in ('href', 'src') if attrs.get(k)]

def broken(site):
    "One line for each address inside the site that does not exist"
    pages = {p.resolve(): Page(p) for p in sorted(site.rglob('*.html'))}
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc: continue
            file = (path.parent/unquote(url.path)).resolve() if url.path else path
            if file.is_dir(): file = file/'index.html'
            if not file.exists(): yield f'{path.relative_to(site.resolve())}: no page or file {target}'
            elif url.fragment and file in pages and unquote(url.fragment) not in pages[file].ids:
                yield f'{path.relative_to(site.resolve())}: no anchor {target}'

def broken_in(markdown):
    "One line for each file that a Markdown page names and that does not exist"
    for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', markdown.read_text(encoding='utf-8')):
        if urlsplit(target).scheme or (markdown.parent/target).exists(): continue
        yield f'{markdown.name}: no file {target}'

if __name__ == '__main__':
    site = Path(sys.argv[1]) if len(sys.argv) > 1 else root/'_docs'
    pages = len(list(site.rglob('*.html')))
    if not pages: sys.exit(f'{site}: no pages; run `make docs` first')
    found = sorted({*broken(site), *broken_in(root/'README.md'), *broken_in(root/'CONTRIBUTING.md')})
    print(*found, f'{pages} pages, {len(found)} broken links', sep='\n')
    sys.exit(bool(found))
