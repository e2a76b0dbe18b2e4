"Hands the text of settings.ini to setuptools; licence, status, audience and language are repeated here in its words."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

cfg = ConfigParser()
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
lines = lambda key: [o.strip() for o in cfg.get(key, '').splitlines() if o.strip()]
extras = {k.removesuffix('_requirements').replace('_', '-'): lines(k) for k in cfg if k.endswith('_requirements')}

class WithRecipes(build_py):
    "The recipes lie beside the package in a checkout, and within it in a wheel"
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        for file in sorted((Path(__file__).parent/'recipes').glob('*.yaml')):
            self.copy_file(file, self._target(file.name))

    def _target(self, name):
        folder = Path(self.build_lib)/cfg['lib_name']/'recipes'
        self.mkpath(str(folder))
        return str(folder/name)

setup(name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], url=cfg['git_url'],
      author=cfg['author'], author_email=cfg['author_email'], keywords=cfg['keywords'].split(), license='Apache-2.0',
      classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Natural Language :: English',
                   'Programming Language :: Python :: 3.11', 'Programming Language :: Python :: 3.12'],
      long_description=(Path(__file__).parent/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
      packages=find_packages(include=['competition_kit*']), include_package_data=True,
      package_data={cfg['lib_path']: ['Snakefile', 'profiles/*.yaml']}, cmdclass=dict(build_py=WithRecipes),
      python_requires=f">={cfg['min_python']}", install_requires=lines('requirements'), extras_require=extras,
      entry_points={'console_scripts': lines('console_scripts'), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"]}, zip_safe=False)
