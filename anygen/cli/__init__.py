"""The command line: `main`, and the commands by what they are for."""

from anygen.cli.app import app as app
from anygen.cli.app import main as main
