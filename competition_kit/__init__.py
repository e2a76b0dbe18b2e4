__version__ = "0.1.0"
import competition_kit.log  # noqa: F401 it adds itself to record.after_run, so every run that ends updates the workbook
