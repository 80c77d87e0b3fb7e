"""The ledger of an import: written once, and only added to."""

from pgflow_prefect.definitions.origin import Ledger, LedgerLine, merge_ledger

OF_WORKFLOW = LedgerLine(None, "schedule", "None.", is_done=True)
OF_STEP = LedgerLine("load", "pool", "`erp`. There are no pools here.", is_done=False)
NEW = LedgerLine("load", "retries", "3.", is_done=True)


def test_a_ledger_lists_first_the_workflow_and_then_its_steps() -> None:
    page = Ledger("etl: from Airflow", (OF_WORKFLOW, OF_STEP)).write()
    assert page.startswith("# etl: from Airflow\n")
    assert "## The workflow\n\n- [x] **schedule**: None.\n\n## Its steps\n\n- [ ] `load` **pool**: `erp`." in page


def test_a_line_of_another_import_is_added_at_the_end_and_nothing_else_changes() -> None:
    ledger = Ledger("etl", (OF_WORKFLOW, OF_STEP))
    page = ledger.write().replace("- [ ] `load` **pool**", "- [x] `load` **pool**") + "\nMy own notes, without an end"
    change = merge_ledger(page, Ledger("etl", (OF_WORKFLOW, OF_STEP, NEW)))
    assert change.text is not None
    assert change.text.startswith(page)
    assert change.text.endswith("\n## Added by a later import\n\n- [x] `load` **retries**: 3.\n")
    assert (change.added, change.gone) == ((NEW,), ())


def test_the_same_ledger_again_changes_nothing() -> None:
    ledger = Ledger("etl", (OF_WORKFLOW, OF_STEP))
    change = merge_ledger(ledger.write().replace("[ ]", "[X]"), ledger)
    assert (change.text, change.added, change.gone) == (None, (), ())


def test_a_line_that_no_longer_holds_is_named_and_stays() -> None:
    change = merge_ledger(Ledger("etl", (OF_WORKFLOW, OF_STEP)).write(), Ledger("etl", (OF_WORKFLOW,)))
    assert change.text is None
    assert change.gone == (OF_STEP.text,)


def test_a_third_import_adds_below_the_second_one() -> None:
    page = Ledger("etl", (OF_WORKFLOW,)).write()
    for lines in ((OF_WORKFLOW, OF_STEP), (OF_WORKFLOW, OF_STEP, NEW)):
        page = merge_ledger(page, Ledger("etl", lines)).text or ""
    assert page.count("## Added by a later import") == 1
    assert page.endswith(f"{OF_STEP.write()}\n{NEW.write()}\n")


def test_names_from_elsewhere_are_no_markdown_and_stay_on_their_line() -> None:
    line = LedgerLine("a`b\n# c", "x", "y\n- [x] forged", is_done=False).write()
    assert "\n" not in line
    assert line.startswith("- [ ] `` a`b")
