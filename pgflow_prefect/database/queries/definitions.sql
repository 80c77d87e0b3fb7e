-- Workflows, their steps and deps.

-- list_workflows --
-- Every workflow with its size, its runs, and whether they are taken.
SELECT w.slug,
       (SELECT count(*) FROM pgflow.steps s WHERE s.workflow_slug = w.slug) AS steps,
       (SELECT count(*) FROM pgflow.deps d WHERE d.workflow_slug = w.slug) AS deps,
       coalesce(r.pending, 0) AS pending, coalesce(r.completed, 0) AS completed, coalesce(r.failed, 0) AS failed,
       e.enabled, b.bound
FROM pgflow.workflows w
LEFT JOIN (SELECT workflow_slug, jsonb_object_agg(kind, steps) AS bound
           FROM (SELECT workflow_slug, kind, count(*) AS steps FROM pgflow_prefect.bindings GROUP BY 1, 2) kinds
           GROUP BY workflow_slug) b ON b.workflow_slug = w.slug
LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = w.slug
LEFT JOIN (SELECT workflow_slug,
                  count(*) FILTER (WHERE status = 'pending') AS pending,
                  count(*) FILTER (WHERE status = 'completed') AS completed,
                  count(*) FILTER (WHERE status = 'failed') AS failed
           FROM pgflow.runs GROUP BY workflow_slug) r ON r.workflow_slug = w.slug
ORDER BY w.slug

-- list_slugs --
-- The slugs of all workflows.
SELECT slug FROM pgflow.workflows ORDER BY slug

-- load_definition --
-- A workflow as it is defined now, in one statement: an edit in between can't mix two versions.
SELECT w.slug,
       ARRAY(SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = w.slug ORDER BY s.slug) AS steps,
       ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d WHERE d.workflow_slug = w.slug
             ORDER BY d.from_step_slug, d.to_step_slug) AS deps
FROM pgflow.workflows w
WHERE w.slug = %(workflow_slug)s

-- limit_waiting --
-- Until the transaction's end, wait no longer than this for a lock.
SELECT set_config('lock_timeout', '10s', true)

-- insert_workflow --
-- A new workflow; no row where it is there already.
INSERT INTO pgflow.workflows (slug) VALUES (%(workflow_slug)s) ON CONFLICT DO NOTHING RETURNING slug

-- lock_workflow --
-- Let nobody else edit a workflow, nor start a run of it. As strong as the deletion of a step needs it, and from the
-- start: a weaker lock, made stronger later, would deadlock with whoever inserts a step meanwhile.
SELECT slug FROM pgflow.workflows WHERE slug = %(workflow_slug)s FOR UPDATE

-- insert_steps --
-- Steps of a workflow.
INSERT INTO pgflow.steps (workflow_slug, slug)
SELECT %(workflow_slug)s, slug FROM unnest(%(steps)s::text[]) AS slug

-- insert_deps --
-- Deps of a workflow, in one statement: after each, the engine looks for cycles.
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug)
SELECT %(workflow_slug)s, upstream, downstream
FROM unnest(%(upstream)s::text[], %(downstream)s::text[]) AS dep (upstream, downstream)

-- delete_steps --
-- Steps of a workflow, as far as no run needs them.
DELETE FROM pgflow.steps WHERE workflow_slug = %(workflow_slug)s AND slug = ANY (%(steps)s)

-- delete_deps --
-- Deps of a workflow.
DELETE FROM pgflow.deps d
USING unnest(%(upstream)s::text[], %(downstream)s::text[]) AS gone (upstream, downstream)
WHERE d.workflow_slug = %(workflow_slug)s AND d.from_step_slug = gone.upstream AND d.to_step_slug = gone.downstream

-- load_run_definition --
-- The definition that a run began with; the current one of a run that nothing was done to yet.
SELECT r.workflow_slug AS slug,
       CASE WHEN r.definition_id IS NULL
            THEN ARRAY(SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = r.workflow_slug ORDER BY s.slug)
            ELSE ARRAY(SELECT s.slug FROM pgflow.definition_steps s WHERE s.definition_id = r.definition_id
                       ORDER BY s.slug) END AS steps,
       CASE WHEN r.definition_id IS NULL
            THEN ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d
                       WHERE d.workflow_slug = r.workflow_slug ORDER BY d.from_step_slug, d.to_step_slug)
            ELSE ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.definition_deps d
                       WHERE d.definition_id = r.definition_id ORDER BY d.from_step_slug, d.to_step_slug) END AS deps
FROM pgflow.runs r
WHERE r.id = %(run_id)s

-- find_pending_user --
-- A pending run that has executed one of these steps: only when it has ended, its rows can go.
SELECT r.id FROM pgflow.runs r
WHERE r.workflow_slug = %(workflow_slug)s AND r.status = 'pending'
  AND EXISTS (SELECT FROM pgflow.step_states s WHERE s.run_id = r.id AND s.step_slug = ANY (%(steps)s))
ORDER BY r.created_at
LIMIT 1
