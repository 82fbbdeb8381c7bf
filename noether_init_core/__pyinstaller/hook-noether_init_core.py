"""What PyInstaller adds to a program that imports the package; it reads the names ``datas`` and ``hiddenimports``."""

from noether_init_core.__pyinstaller import collected

datas, hiddenimports = collected()
