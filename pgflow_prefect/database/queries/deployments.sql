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
SELECT coalesce((SELECT beats FROM pgflow_prefect.heartbeats), '{}') AS beats

-- load_definitions --
-- Workflows as they are defined now, in one statement; no slugs: all of them.
SELECT w.slug,
       ARRAY(SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = w.slug ORDER BY s.slug) AS steps,
       ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d WHERE d.workflow_slug = w.slug
             ORDER BY d.from_step_slug, d.to_step_slug) AS deps
FROM pgflow.workflows w
WHERE %(workflow_slugs)s::text[] IS NULL OR w.slug = ANY (%(workflow_slugs)s)
ORDER BY w.slug

-- list_workflows_with_bindings --
-- The workflows of which rows say who does some of their steps, or all.
SELECT DISTINCT workflow_slug FROM pgflow_prefect.bindings

-- enable_workflows --
-- Let workers and bridges take the new runs of several workflows.
SELECT e.workflow_slug, e.enabled, e.since
FROM unnest(%(workflow_slugs)s::text[]) AS wanted (slug)
CROSS JOIN LATERAL pgflow_prefect.enable_workflow(wanted.slug, true) e
