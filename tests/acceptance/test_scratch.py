
import signal, time, subprocess
from tests.acceptance.conftest import *
from tests.acceptance.test_terminal import watch
from tests.engine import CHAIN, define, statuses, value
SYNC = """
import time
from pathlib import Path
from pgflow_prefect import Workflow
w = Workflow("x")
@w.step
def a():
    Path("started").touch(); time.sleep(12)
"""
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_sync(cli, db, sig):
    define(db, "x", {"a": []})
    cli.write("flows/x.py", SYNC)
    p = cli.start("run", "x")
    wait_until(lambda: (cli.directory/"started").exists(), "s")
    t = time.monotonic()
    p.send_signal(sig)
    out, err = p.communicate(timeout=40)
    print(sig, p.returncode, time.monotonic()-t, out, err)
    print(db.execute("select status, error_message from pgflow.runs").fetchall(), statuses(db, find_only_run(db)))
def test_two(cli, db, chain):
    gate = cli.write("gate")
    p = cli.start("run", chain)
    wait_until(lambda: "b" in cli.executions(), "b executes")
    q = cli.start("run", "--resume", str(find_only_run(db)))
    wait_until(lambda: cli.executions().count("b")==2, "b executes")
    gate.unlink()
    for x in (p, q):
        print(x.communicate(timeout=60), x.returncode)
    print(cli.executions())
def test_eph(outside, dsn, db):
    define(db, "chain", CHAIN)
    outside.write("flows/chain.py", CHAIN_HANDLERS)
    t = time.monotonic()
    r = outside("run", "chain", "--dsn", dsn, PREFECT_SERVER_ANALYTICS_ENABLED="false")
    print(r, time.monotonic()-t)
def test_ptyrun(cli, db, chain):
    print(repr(watch(cli, "run", chain)))
    print(repr(watch(cli, "status", str(find_only_run(db)))))
    cli.write("broken")
    print(repr(watch(cli, "run", chain)))
