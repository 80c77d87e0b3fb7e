-- What deploying needs: all workflows in a few statements, however many there are.

-- read_installation --
-- This database among those that share a Prefect server.
SELECT id, stamp, current_stamp, former_stamps, fits, is_used FROM pgflow_prefect.read_installation()

-- use_installation --
-- The same, for who is about to write to Prefect: a copy of an unused database gets an id of its own.
SELECT id, stamp, current_stamp, former_stamps, fits, is_used FROM pgflow_prefect.use_installation()

-- beat --
-- Give a sign of life, and return the latest ones.
SELECT pgflow_prefect.beat(%(beat)s, %(every)s) AS beats

-- list_beats --
-- The latest signs of life.
SELECT pgflow_prefect.list_beats() AS beats

-- load_definitions --
-- Workflows as they are defined now, in one statement; no slugs: all of them.
SELECT slug, steps, deps, rules, when_failed, failed_by FROM pgflow_prefect.load_definitions(%(workflow_slugs)s)

-- list_workflows_with_bindings --
-- The workflows of which rows say who does some of their steps, or all.
SELECT workflow_slug FROM pgflow_prefect.list_workflows_with_bindings() AS workflow_slug

-- enable_workflows --
-- Let workers and bridges take the new runs of several workflows.
SELECT workflow_slug, enabled, since FROM pgflow_prefect.enable_workflows(%(workflow_slugs)s)
