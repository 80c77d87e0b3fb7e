-- Who does a step.

-- list_bindings --
-- What the steps of a workflow are bound to, where a row says so.
SELECT step_slug, kind, target, options FROM pgflow_prefect.list_bindings(%(workflow_slug)s)

-- list_network_bindings --
-- The rows of all workflows that name an endpoint or a queue.
SELECT workflow_slug, step_slug, kind, target, options FROM pgflow_prefect.list_network_bindings()

-- bind_step --
-- Say who does a step; no kind: no row.
SELECT pgflow_prefect.bind_step(%(workflow_slug)s, %(step_slug)s, %(kind)s, %(target)s, %(options)s::jsonb) AS changed

-- undo_binding --
-- Take back the last change of a step's binding.
SELECT pgflow_prefect.undo_binding(%(workflow_slug)s, %(step_slug)s) AS changed

-- observe_workflow --
-- Bind all steps to others.
SELECT pgflow_prefect.observe_workflow(%(workflow_slug)s) AS changed

-- list_binding_changes --
-- Who changed what, the latest first.
SELECT step_slug, before, after, changed_at, changed_by, undone_at, undone_by
FROM pgflow_prefect.list_binding_changes(%(workflow_slug)s, %(step_slug)s, %(limit)s)

-- list_bound_workflows --
-- The workflows that need no Python: each of their steps has a row, and none of those says Python.
SELECT slug FROM pgflow_prefect.list_bound_workflows() AS slug

-- find_functions --
-- What these functions of jsonb return; of one that does not exist, nothing.
SELECT wanted.name, f.returns
FROM unnest(%(names)s::text[], %(schemas)s::text[], %(functions)s::text[]) AS wanted (name, schema, function)
CROSS JOIN LATERAL (
    SELECT pg_catalog.format_type(p.prorettype, NULL) || CASE WHEN p.proretset THEN ' rows' ELSE '' END AS returns
    FROM pg_catalog.pg_proc p
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = wanted.schema AND p.proname = wanted.function AND p.prokind = 'f'
      AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
      AND p.proargtypes[0] = 'jsonb'::regtype AND p.pronargs - p.pronargdefaults <= 1 AND p.pronargs >= 1
    ORDER BY p.pronargs LIMIT 1
) f

-- report_shadow --
-- Note what came of a handler that ran beside an external worker.
SELECT pgflow_prefect.report_shadow(%(run_id)s, %(step_slug)s, %(task_index)s, %(outcome)s, %(details)s, %(seconds)s)

-- list_shadows --
-- What came of the shadows of a workflow, by step.
SELECT step_slug, same, different, failed, seconds, details FROM pgflow_prefect.list_shadows(%(workflow_slug)s)
