-- pgflow_prefect: reading and editing definitions, bindings, and which workflows are enabled.
--
-- A part of the contract of ../CONTRACT.md for the classic schema. Needs pgflow.sql and classic/pgflow_prefect.sql.
-- psql -d DATABASE -f definitions.sql; one transaction, safe to run again.
--
-- Functions that only read raise an error where row-level security would hide rows. They are planned with the values
-- that they are called with, as the same statement sent by itself would be: an argument that is NULL costs nothing.
-- Functions that write tables with triggers of users have no SET clause: a trigger finds the settings of its caller.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.owners') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect is missing'
            USING HINT = 'Run pgflow.sql and classic/pgflow_prefect.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0';
    PERFORM pgflow.lock_schema('pgflow_prefect');
    IF (SELECT max(substring(p.prosrc FROM '[0-9]+')::int) FROM pg_catalog.pg_proc p
        WHERE p.pronamespace = 'pgflow_prefect'::regnamespace AND p.proname = 'adapter_version') > 10 THEN
        RAISE EXCEPTION 'the schema pgflow_prefect has a later version than 10, and this script is of version 10'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
END
$guard$;


------------------------------------------------------------------------------------------------------------
-- Reading definitions
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_workflows()
RETURNS TABLE (slug text, steps bigint, deps bigint, pending bigint, completed bigint, failed bigint,
               enabled boolean, bound jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT w.slug,
               (SELECT count(*) FROM pgflow.steps s WHERE s.workflow_slug = w.slug),
               (SELECT count(*) FROM pgflow.deps d WHERE d.workflow_slug = w.slug),
               coalesce(r.pending, 0), coalesce(r.completed, 0), coalesce(r.failed, 0), e.enabled, b.bound
        FROM pgflow.workflows w
        LEFT JOIN (SELECT kinds.workflow_slug, jsonb_object_agg(kinds.kind, kinds.steps) AS bound
                   FROM (SELECT i.workflow_slug, i.kind, count(*) AS steps
                         FROM pgflow_prefect.bindings i GROUP BY 1, 2) kinds
                   GROUP BY kinds.workflow_slug) b ON b.workflow_slug = w.slug
        LEFT JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = w.slug
        LEFT JOIN (SELECT i.workflow_slug,
                          count(*) FILTER (WHERE i.status = 'pending') AS pending,
                          count(*) FILTER (WHERE i.status = 'completed') AS completed,
                          count(*) FILTER (WHERE i.status = 'failed') AS failed
                   FROM pgflow.runs i GROUP BY i.workflow_slug) r ON r.workflow_slug = w.slug
        ORDER BY w.slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_workflows() IS
    'Every workflow with its size, its runs by status, whether workers take them, and its bound steps by kind.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_slugs() RETURNS SETOF text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY SELECT w.slug FROM pgflow.workflows w ORDER BY w.slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_slugs() IS 'The slugs of all workflows.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_unlike_snapshots() RETURNS SETOF text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT DISTINCT w.slug
        FROM pgflow.workflows w
        JOIN pgflow.definitions d ON d.workflow_slug = w.slug AND d.version = w.version
        WHERE EXISTS (SELECT s.slug, s.rule, s.required_input_pattern, s.forbidden_input_pattern, s.when_unmet,
                             s.when_exhausted, s.step_type, s.map_path, s.max_items, s.when_empty, s.when_item_fails,
                             s.child_workflow, s.child_payload, s.child_retries, s.max_children,
                             CASE s.step_type WHEN 'map' THEN
                                 (SELECT min(e.from_step_slug) FROM pgflow.deps e
                                  WHERE e.workflow_slug = w.slug AND e.to_step_slug = s.slug
                                    AND (s.map_over IS NULL OR e.from_step_slug = s.map_over)) END
                      FROM pgflow.steps s WHERE s.workflow_slug = w.slug
                      EXCEPT SELECT s.slug, s.rule, s.required_input_pattern, s.forbidden_input_pattern, s.when_unmet,
                                    s.when_exhausted, s.step_type, s.map_path, s.max_items, s.when_empty,
                                    s.when_item_fails, s.child_workflow, s.child_payload, s.child_retries, s.max_children,
                                    s.map_over
                      FROM pgflow.definition_steps s WHERE s.definition_id = d.id)
           OR EXISTS (SELECT s.slug FROM pgflow.definition_steps s WHERE s.definition_id = d.id
                      EXCEPT SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = w.slug)
           OR EXISTS (SELECT e.from_step_slug, e.to_step_slug FROM pgflow.deps e WHERE e.workflow_slug = w.slug
                      EXCEPT SELECT e.from_step_slug, e.to_step_slug FROM pgflow.definition_deps e
                      WHERE e.definition_id = d.id)
           OR EXISTS (SELECT e.from_step_slug, e.to_step_slug FROM pgflow.definition_deps e WHERE e.definition_id = d.id
                      EXCEPT SELECT e.from_step_slug, e.to_step_slug FROM pgflow.deps e WHERE e.workflow_slug = w.slug)
        ORDER BY 1;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_unlike_snapshots() IS
    'Workflows whose next run begins with a snapshot that is unlike the rows of steps and deps: these were edited while the '
    'triggers were disabled.';


DO $rules$
BEGIN
    -- What a function returns can't be changed in place: those that did not tell of rules go.
    IF EXISTS (SELECT FROM pg_catalog.pg_proc
               WHERE oid = to_regprocedure('pgflow_prefect.load_definitions(text[])') AND 'rules' <> ALL (proargnames)) THEN
        DROP FUNCTION pgflow_prefect.load_definitions(text[]);
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_proc
               WHERE oid = to_regprocedure('pgflow_prefect.load_run_definition(uuid)') AND 'rules' <> ALL (proargnames)) THEN
        DROP FUNCTION pgflow_prefect.load_run_definition(uuid);
    END IF;
END
$rules$;


CREATE OR REPLACE FUNCTION pgflow_prefect.describe_rules(
    rule text, required jsonb, forbidden jsonb, when_unmet text, when_exhausted text, fails_run boolean, is_setup boolean
) RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT nullif('{}'::jsonb
        || CASE WHEN rule IS NULL THEN '{}' ELSE jsonb_build_object('rule', rule) END
        || CASE WHEN required IS NULL THEN '{}' ELSE jsonb_build_object('only_if', required) END
        || CASE WHEN forbidden IS NULL THEN '{}' ELSE jsonb_build_object('unless', forbidden) END
        || CASE when_unmet WHEN 'skip' THEN '{}' ELSE jsonb_build_object('when_unmet', when_unmet) END
        || CASE when_exhausted WHEN 'fail' THEN '{}' ELSE jsonb_build_object('when_exhausted', when_exhausted) END
        || CASE WHEN fails_run THEN '{}' ELSE jsonb_build_object('fails_run', false) END
        || CASE WHEN is_setup THEN jsonb_build_object('is_setup', true) ELSE '{}' END, '{}')
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_rules(text, jsonb, jsonb, text, text, boolean, boolean) IS
    'What is said of a step beside its name, without what goes without saying; NULL for nothing.';


CREATE OR REPLACE FUNCTION pgflow_prefect.describe_map(
    step_type text, map_over text, map_path text[], max_items int, when_empty text, when_item_fails text
) RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN step_type <> 'map' THEN '{}' ELSE jsonb_build_object('map', '{}'::jsonb
        || CASE WHEN map_over IS NULL THEN '{}' ELSE jsonb_build_object('over', map_over) END
        || CASE WHEN cardinality(map_path) > 0 THEN jsonb_build_object('path', map_path) ELSE '{}' END
        || CASE WHEN max_items IS NULL THEN '{}' ELSE jsonb_build_object('max_items', max_items) END
        || CASE when_empty WHEN 'complete' THEN '{}' ELSE jsonb_build_object('when_empty', when_empty) END
        || CASE when_item_fails WHEN 'stop' THEN '{}' ELSE jsonb_build_object('when_item_fails', when_item_fails) END) END
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_map(text, text, text[], int, text, text) IS
    'What is said of a map, as the member `map` of an object, without what goes without saying; an empty object for any '
    'other step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.describe_child(
    workflow text, payload text[], retries int, max_children int
) RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN workflow IS NULL THEN '{}' ELSE jsonb_build_object('child', jsonb_build_object('workflow', workflow)
        || CASE WHEN payload IS NULL THEN '{}' ELSE jsonb_build_object('payload', payload) END
        || CASE retries WHEN 0 THEN '{}' ELSE jsonb_build_object('retries', retries) END
        || CASE WHEN max_children IS NULL THEN '{}' ELSE jsonb_build_object('max_children', max_children) END) END
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_child(text, text[], int, int) IS
    'What is said of a step that is a run of another workflow, as the member `child` of an object; an empty object for any '
    'other step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.load_definitions(workflow_slugs text[] DEFAULT NULL)
RETURNS TABLE (slug text, steps text[], deps text[], rules jsonb, when_failed text, failed_by text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY -- one statement: an edit in between can't mix two versions
        SELECT w.slug,
               ARRAY(SELECT s.slug FROM pgflow.steps s WHERE s.workflow_slug = w.slug ORDER BY s.slug),
               ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d WHERE d.workflow_slug = w.slug
                     ORDER BY d.from_step_slug, d.to_step_slug),
               (SELECT coalesce(jsonb_object_agg(r.slug, r.rules), '{}')
                FROM (SELECT s.slug, nullif(coalesce(pgflow_prefect.describe_rules(
                                 s.rule, s.required_input_pattern, s.forbidden_input_pattern, s.when_unmet,
                                 s.when_exhausted, s.fails_run, s.is_setup), '{}') || pgflow_prefect.describe_map(
                                 s.step_type, coalesce(s.map_over, (
                                     SELECT CASE count(*) WHEN 0 THEN 'payload' WHEN 1 THEN min(d.from_step_slug) END
                                     FROM pgflow.deps d
                                     WHERE s.step_type = 'map' AND d.workflow_slug = w.slug AND d.to_step_slug = s.slug)),
                                 s.map_path, s.max_items, s.when_empty, s.when_item_fails)
                             || pgflow_prefect.describe_child(s.child_workflow, s.child_payload, s.child_retries,
                                                              s.max_children), '{}') AS rules
                      FROM pgflow.steps s WHERE s.workflow_slug = w.slug) r WHERE r.rules IS NOT NULL),
               w.when_failed, w.failed_by
        FROM pgflow.workflows w
        WHERE load_definitions.workflow_slugs IS NULL OR w.slug = ANY (load_definitions.workflow_slugs)
        ORDER BY w.slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.load_definitions(text[]) IS
    'These workflows as they are defined now; NULL: all. A dep is a pair, upstream first. rules: an object, by step, of what '
    'is said of it beside its name.';


CREATE OR REPLACE FUNCTION pgflow_prefect.load_run_definition(run_id uuid)
RETURNS TABLE (slug text, steps text[], deps text[], rules jsonb, uses_rules boolean, continues boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.workflow_slug,
               CASE WHEN r.definition_id IS NULL
                    THEN ARRAY(SELECT s.slug FROM pgflow.steps s
                               WHERE s.workflow_slug = r.workflow_slug ORDER BY s.slug)
                    ELSE ARRAY(SELECT s.slug FROM pgflow.definition_steps s
                               WHERE s.definition_id = r.definition_id ORDER BY s.slug) END,
               CASE WHEN r.definition_id IS NULL
                    THEN ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.deps d
                               WHERE d.workflow_slug = r.workflow_slug ORDER BY d.from_step_slug, d.to_step_slug)
                    ELSE ARRAY(SELECT ARRAY[d.from_step_slug, d.to_step_slug] FROM pgflow.definition_deps d
                               WHERE d.definition_id = r.definition_id ORDER BY d.from_step_slug, d.to_step_slug) END,
               (SELECT coalesce(jsonb_object_agg(e.slug, e.rules), '{}')
                FROM (SELECT s.slug, nullif(coalesce(pgflow_prefect.describe_rules(
                                 s.rule, s.required_input_pattern, s.forbidden_input_pattern, s.when_unmet,
                                 s.when_exhausted, s.decides, false), '{}') || pgflow_prefect.describe_map(
                                 s.step_type, coalesce(s.map_over, 'payload'), s.map_path, s.max_items, s.when_empty,
                                 s.when_item_fails)
                             || pgflow_prefect.describe_child(s.child_workflow, s.child_payload, s.child_retries,
                                                              s.max_children), '{}') AS rules
                      FROM pgflow.definition_steps s WHERE s.definition_id = r.definition_id) e
                WHERE e.rules IS NOT NULL),
               r.uses_rules, r.continues
        FROM pgflow.runs r
        WHERE r.id = load_run_definition.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.load_run_definition(uuid) IS
    'The definition that a run began with; the current one of a run that has not begun. fails_run says whether the failure '
    'of a step fails this run. No row: there is no such run.';


------------------------------------------------------------------------------------------------------------
-- Editing definitions: in one transaction, after lock_workflow or insert_workflow
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.insert_workflow(workflow_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    INSERT INTO pgflow.workflows (slug) VALUES (insert_workflow.workflow_slug) ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.insert_workflow(text) IS 'Adds a workflow; false where it is there already.';


CREATE OR REPLACE FUNCTION pgflow_prefect.lock_workflow(workflow_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    -- As strong as the deletion of a step needs it, and from the start: a weaker lock, made stronger later, would
    -- deadlock with a session that inserts a step meanwhile.
    PERFORM FROM pgflow.workflows w WHERE w.slug = lock_workflow.workflow_slug FOR UPDATE;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.lock_workflow(text) IS
    'Lets no other session edit the workflow or start a run of it until the transaction ends; false if there is '
    'no such workflow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.insert_steps(workflow_slug text, steps text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    INSERT INTO pgflow.steps (workflow_slug, slug)
    SELECT insert_steps.workflow_slug, added.slug FROM pg_catalog.unnest(insert_steps.steps) AS added (slug);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.insert_steps(text, text[]) IS 'Adds steps to a workflow.';


CREATE OR REPLACE FUNCTION pgflow_prefect.set_rules(
    workflow_slug text, rules jsonb, when_failed text, failed_by text
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    said pg_catalog.record;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    UPDATE pgflow.workflows w SET when_failed = set_rules.when_failed, failed_by = set_rules.failed_by
    WHERE w.slug OPERATOR(pg_catalog.=) set_rules.workflow_slug
      AND (coalesce(w.when_failed, '') OPERATOR(pg_catalog.<>) coalesce(set_rules.when_failed, '')
           OR w.failed_by OPERATOR(pg_catalog.<>) set_rules.failed_by);
    FOR said IN
        SELECT e.key AS slug, r.rule, r.only_if, r.unless, coalesce(r.when_unmet, 'skip') AS when_unmet,
               coalesce(r.when_exhausted, 'fail') AS when_exhausted, coalesce(r.fails_run, true) AS fails_run,
               coalesce(r.is_setup, false) AS is_setup,
               CASE WHEN r.map IS NULL THEN 'single' ELSE 'map' END AS step_type, m.over AS map_over, m.path AS map_path,
               m.max_items, coalesce(m.when_empty, 'complete') AS when_empty,
               coalesce(m.when_item_fails, 'stop') AS when_item_fails, c.workflow AS child_workflow,
               c.payload AS child_payload, coalesce(c.retries, 0) AS child_retries, c.max_children
        FROM pg_catalog.jsonb_each(rules) e
        CROSS JOIN LATERAL pg_catalog.jsonb_to_record(e.value) AS r(
            rule pg_catalog.text, only_if pg_catalog.jsonb, unless pg_catalog.jsonb, when_unmet pg_catalog.text,
            when_exhausted pg_catalog.text, fails_run boolean, is_setup boolean, map pg_catalog.jsonb,
            child pg_catalog.jsonb)
        CROSS JOIN LATERAL pg_catalog.jsonb_to_record(coalesce(r.map, '{}')) AS m(
            "over" pg_catalog.text, path pg_catalog.text[], max_items int, when_empty pg_catalog.text,
            when_item_fails pg_catalog.text)
        CROSS JOIN LATERAL pg_catalog.jsonb_to_record(coalesce(r.child, '{}')) AS c(
            workflow pg_catalog.text, payload pg_catalog.text[], retries int, max_children int)
    LOOP
        UPDATE pgflow.steps s
        SET rule = said.rule, required_input_pattern = said.only_if, forbidden_input_pattern = said.unless,
            when_unmet = said.when_unmet, when_exhausted = said.when_exhausted, fails_run = said.fails_run,
            is_setup = said.is_setup, step_type = said.step_type, map_over = said.map_over, map_path = said.map_path,
            max_items = said.max_items, when_empty = said.when_empty, when_item_fails = said.when_item_fails,
            child_workflow = said.child_workflow, child_payload = said.child_payload,
            child_retries = said.child_retries, max_children = said.max_children
        WHERE s.workflow_slug OPERATOR(pg_catalog.=) set_rules.workflow_slug
          AND s.slug OPERATOR(pg_catalog.=) said.slug;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.set_rules(text, jsonb, text, text) IS
    'Says of a workflow and of these of its steps all that load_definitions tells: an empty object makes a step plain.';


CREATE OR REPLACE FUNCTION pgflow_prefect.insert_deps(workflow_slug text, upstream text[], downstream text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) -- one statement: then cycles are looked for
    SELECT insert_deps.workflow_slug, added.upstream, added.downstream
    FROM ROWS FROM (pg_catalog.unnest(insert_deps.upstream), pg_catalog.unnest(insert_deps.downstream))
         AS added (upstream, downstream);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.insert_deps(text, text[], text[]) IS
    'Adds dependencies: the upstream and the downstream step of each stand at the same place of the two arrays.';


CREATE OR REPLACE FUNCTION pgflow_prefect.delete_steps(workflow_slug text, steps text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    DELETE FROM pgflow.steps s
    WHERE s.workflow_slug OPERATOR(pg_catalog.=) delete_steps.workflow_slug
      AND s.slug OPERATOR(pg_catalog.=) ANY (delete_steps.steps);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.delete_steps(text, text[]) IS 'Removes steps that no row refers to.';


CREATE OR REPLACE FUNCTION pgflow_prefect.delete_deps(workflow_slug text, upstream text[], downstream text[])
RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    DELETE FROM pgflow.deps d
    USING ROWS FROM (pg_catalog.unnest(delete_deps.upstream), pg_catalog.unnest(delete_deps.downstream))
          AS gone (upstream, downstream)
    WHERE d.workflow_slug OPERATOR(pg_catalog.=) delete_deps.workflow_slug
      AND d.from_step_slug OPERATOR(pg_catalog.=) gone.upstream
      AND d.to_step_slug OPERATOR(pg_catalog.=) gone.downstream;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.delete_deps(text, text[], text[]) IS
    'Removes dependencies, given as insert_deps takes them.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_pending_user(workflow_slug text, steps text[]) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT r.id FROM pgflow.runs r
        WHERE r.workflow_slug = find_pending_user.workflow_slug AND r.status = 'pending'
          AND EXISTS (SELECT FROM pgflow.step_states s
                      WHERE s.run_id = r.id AND s.step_slug = ANY (find_pending_user.steps))
        ORDER BY r.created_at
        LIMIT 1;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_pending_user(text, text[]) IS
    'The oldest pending run that has a state of one of these steps. Their rows can go only after its end.';


------------------------------------------------------------------------------------------------------------
-- Bindings: who does the work of a step
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_bindings(workflow_slug text)
RETURNS TABLE (step_slug text, kind text, target text, options jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT b.step_slug, b.kind, b.target, b.options FROM pgflow_prefect.bindings b
        WHERE b.workflow_slug = list_bindings.workflow_slug
        ORDER BY b.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_bindings(text) IS
    'The bindings of a workflow''s steps by rows.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_network_bindings()
RETURNS TABLE (workflow_slug text, step_slug text, kind text, target text, options jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT b.workflow_slug, b.step_slug, b.kind, b.target, b.options FROM pgflow_prefect.bindings b
        WHERE b.kind IN ('http', 'queue')
        ORDER BY b.workflow_slug, b.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_network_bindings() IS 'The bindings of all workflows to endpoints and queues.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_binding_changes(workflow_slug text, only_step text, at_most int)
RETURNS TABLE (step_slug text, before jsonb, after jsonb, changed_at timestamptz, changed_by text,
               undone_at timestamptz, undone_by text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT c.step_slug, c.before, c.after, c.changed_at, c.changed_by, c.undone_at, c.undone_by
        FROM pgflow_prefect.binding_changes c
        WHERE c.workflow_slug = list_binding_changes.workflow_slug
          AND (list_binding_changes.only_step IS NULL OR c.step_slug = list_binding_changes.only_step)
        ORDER BY c.id DESC
        LIMIT list_binding_changes.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_binding_changes(text, text, int) IS
    'Who changed which binding of a workflow, or of one of its steps, the latest first.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_bound_workflows() RETURNS SETOF text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT w.slug FROM pgflow.workflows w
        WHERE EXISTS (SELECT FROM pgflow_prefect.bindings b WHERE b.workflow_slug = w.slug)
          AND NOT EXISTS (
              SELECT FROM pgflow.steps s
              LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = s.workflow_slug AND b.step_slug = s.slug
              WHERE s.workflow_slug = w.slug AND (b.kind IS NULL OR b.kind = 'python'))
        ORDER BY w.slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_bound_workflows() IS
    'The workflows that need no Python: rows bind all their steps, and none of them to Python.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_workflows_with_bindings() RETURNS SETOF text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY SELECT DISTINCT b.workflow_slug FROM pgflow_prefect.bindings b;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_workflows_with_bindings() IS
    'The workflows with a row for one of their steps, or more.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_shadows(workflow_slug text)
RETURNS TABLE (step_slug text, same bigint, different bigint, failed bigint, seconds double precision, details text[])
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.step_slug, count(*) FILTER (WHERE s.outcome = 'same'), count(*) FILTER (WHERE s.outcome = 'different'),
               count(*) FILTER (WHERE s.outcome = 'failed'), percentile_cont(0.5) WITHIN GROUP (ORDER BY s.seconds),
               coalesce((SELECT l.details FROM pgflow_prefect.shadow_reports l
                         WHERE l.workflow_slug = s.workflow_slug AND l.step_slug = s.step_slug AND l.outcome <> 'same'
                         ORDER BY l.reported_at DESC LIMIT 1), '{}')
        FROM pgflow_prefect.shadow_reports s
        WHERE s.workflow_slug = list_shadows.workflow_slug
        GROUP BY s.workflow_slug, s.step_slug
        ORDER BY s.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_shadows(text) IS
    'The comparisons of a workflow''s shadows, by step: the number of each outcome, the median of their seconds, '
    'and the differences of the latest one.';


------------------------------------------------------------------------------------------------------------
-- Which workflows are enabled
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_enabled()
RETURNS TABLE (workflow_slug text, enabled boolean, since timestamptz)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT e.workflow_slug, e.enabled, e.since FROM pgflow_prefect.enabled_workflows e ORDER BY e.workflow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_enabled() IS 'The workflows that were enabled or disabled.';


CREATE OR REPLACE FUNCTION pgflow_prefect.enable_workflows(workflow_slugs text[])
RETURNS SETOF pgflow_prefect.enabled_workflows
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN QUERY
        SELECT e.* FROM unnest(enable_workflows.workflow_slugs) AS wanted (slug)
        CROSS JOIN LATERAL pgflow_prefect.enable_workflow(wanted.slug, true) e;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.enable_workflows(text[]) IS
    'Lets workers and bridges take the new runs of several workflows.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;
