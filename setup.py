from tempfile import TemporaryDirectory

from setuptools import setup


# A build folder that stays would install modules again that were moved away since.
with TemporaryDirectory() as folder:
    setup(options={"build": {"build_base": folder}})
