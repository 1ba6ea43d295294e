"""python -m alterrec_fast"""

from alterrec_fast.cli import app

app(prog_name="alterrec-fast")
