-- pgflow_prefect on the released pgflow (pgflow.dev): what `pgflow-prefect` reads there.
--
-- A part of the contract of ../CONTRACT.md, for the schema that npm's @pgflow/core installs, 0.7 or later. It creates
-- functions in the schema pgflow_prefect that only read, and changes nothing in the schema pgflow. What a version of
-- pgflow may lack is looked for at each call: run this again after upgrades of this program, not after pgflow's.
-- psql -d DATABASE -f pgflow_prefect.sql -f moving.sql -f steps.sql -f executing.sql -f bindings.sql -f observing.sql; safe to
-- run again.
-- To take them back: `pgflow-prefect init --remove`, or DROP SCHEMA pgflow_prefect CASCADE;
--
-- Statuses are those of the contract. A run or a step that is `started` is pending here. A step that is `skipped` is
-- completed, with the reason. A map step is one step with a number of tasks.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF current_setting('server_version_num')::int < 130000 THEN
        RAISE EXCEPTION 'pgflow_prefect needs PostgreSQL 13 or later, this server is %',
                        current_setting('server_version')
            USING ERRCODE = 'feature_not_supported';
    END IF;
    IF (SELECT count(*) FROM pg_catalog.pg_attribute a
        JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'pgflow' AND (c.relname, a.attname) IN
              (('flows', 'flow_slug'), ('step_tasks', 'task_index'), ('step_states', 'initial_tasks'))) < 3 THEN
        RAISE EXCEPTION 'this database does not have the schema of the released pgflow, 0.7 or later'
            USING HINT = 'Install pgflow first, or run pgflow.sql and the scripts of classic/ in an empty database.';
    END IF;
    IF to_regclass('pgflow_prefect.owners') IS NOT NULL THEN
        RAISE EXCEPTION 'the schema pgflow_prefect of this database belongs to the classic schema'
            USING ERRCODE = 'duplicate_schema',
                  HINT = 'DROP SCHEMA pgflow_prefect CASCADE, if nothing there is needed.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    BEGIN
        CREATE SCHEMA IF NOT EXISTS pgflow_prefect;
    EXCEPTION WHEN unique_violation OR duplicate_schema THEN
        NULL; -- another installation was faster
    END;
    -- This locks the schema itself: two installations at once take turns.
    COMMENT ON SCHEMA pgflow_prefect IS 'What pgflow-prefect reads of the released pgflow.';
END
$guard$;


------------------------------------------------------------------------------------------------------------
-- What versions of pgflow differ in
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_column(table_name text, column_name text, alias text, type_name text)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN EXISTS (
        SELECT FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid
        JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'pgflow' AND c.relname = find_column.table_name AND a.attname = find_column.column_name
          AND NOT a.attisdropped)
        THEN format('%I.%I', alias, column_name) ELSE format('NULL::%s', type_name) END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_column(text, text, text, text) IS
    'A column of one of pgflow''s tables as an expression; NULL of this type where this version of pgflow has none. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_json_problem(document jsonb) RETURNS text
LANGUAGE plpgsql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    size bigint;
BEGIN
    -- The limits that the classic schema has out of the box; here, nothing keeps a document from being beyond them.
    IF jsonb_path_exists(document, 'strict $.**{200} ? (@.type() == "array" || @.type() == "object")') THEN
        RETURN 'nests arrays and objects more than 200 deep';
    ELSIF jsonb_path_exists(document, format('strict $.** ? (@.abs() >= 1e1000 || 1 / (@ * 0 + 3) > 0.%s)',
                                             repeat('3', 999))::jsonpath) THEN
        RETURN 'has a number of more than 1000 digits';
    END IF;
    BEGIN
        size := octet_length(document::text);
    EXCEPTION WHEN program_limit_exceeded OR out_of_memory THEN
        RETURN 'is too large to be written as text';
    END;
    RETURN CASE WHEN size > 33554432 THEN format('has %s bytes as text, more than the limit of 33554432', size) END;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_json_problem(jsonb) IS
    'Why a document is not shown, as the end of a sentence; NULL where it is. Internal.';


------------------------------------------------------------------------------------------------------------
-- Definitions
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
        SELECT f.flow_slug,
               (SELECT count(*) FROM pgflow.steps s WHERE s.flow_slug = f.flow_slug),
               (SELECT count(*) FROM pgflow.deps d WHERE d.flow_slug = f.flow_slug),
               coalesce(r.pending, 0), coalesce(r.completed, 0), coalesce(r.failed, 0),
               (SELECT e.enabled FROM pgflow_prefect.enabled_workflows e WHERE e.workflow_slug = f.flow_slug), NULL::jsonb
        FROM pgflow.flows f
        LEFT JOIN (SELECT i.flow_slug,
                          count(*) FILTER (WHERE i.status NOT IN ('completed', 'failed')) AS pending,
                          count(*) FILTER (WHERE i.status = 'completed') AS completed,
                          count(*) FILTER (WHERE i.status = 'failed') AS failed
                   FROM pgflow.runs i GROUP BY i.flow_slug) r ON r.flow_slug = f.flow_slug
        ORDER BY f.flow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_workflows() IS
    'Every flow with its size and its runs by status. enabled: whether Prefect shows its new runs; nothing here says '
    'whether pgflow''s workers take them.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_slugs() RETURNS SETOF text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY SELECT f.flow_slug FROM pgflow.flows f ORDER BY f.flow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_slugs() IS 'The slugs of all flows.';


DO $told$
DECLARE
    former regprocedure;
BEGIN
    FOR former IN
        SELECT p.oid FROM (VALUES ('load_definitions(text[])', 'rules'), ('load_run_definition(uuid)', 'rules'),
                                  ('list_step_ends(uuid,text[])', 'skip_message'),
                                  ('list_step_states(uuid)', 'skip_message'),
                                  ('list_runs(text,text,text,timestamptz,int,double precision,boolean)', 'logical_date'),
                                  ('read_run(uuid,double precision,boolean)', 'logical_date')) AS known (signature, lacking)
        JOIN pg_catalog.pg_proc p ON p.oid = to_regprocedure('pgflow_prefect.' || known.signature)
        WHERE known.lacking <> ALL (p.proargnames)
    LOOP
        EXECUTE format('DROP FUNCTION %s', former); -- what a function returns can't be changed in place
    END LOOP;
END
$told$;


CREATE OR REPLACE FUNCTION pgflow_prefect.describe_step(
    only_if jsonb, "unless" jsonb, when_unmet text, when_exhausted text, is_map boolean, map_over text
) RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    -- A pattern may have a null inside, so that no key can be left out by its value.
    SELECT CASE WHEN only_if IS NULL THEN '{}' ELSE jsonb_build_object('only_if', only_if) END
        || CASE WHEN "unless" IS NULL THEN '{}' ELSE jsonb_build_object('unless', "unless") END
        || CASE WHEN coalesce(only_if, "unless") IS NULL OR coalesce(when_unmet, 'skip') = 'skip' THEN '{}'
                ELSE jsonb_build_object('when_unmet', when_unmet) END
        || CASE WHEN coalesce(when_exhausted, 'fail') = 'fail' THEN '{}'
                ELSE jsonb_build_object('when_exhausted', when_exhausted) END
        || CASE WHEN is_map THEN jsonb_build_object('map', jsonb_build_object('over', coalesce(map_over, 'payload'))) ELSE '{}' END
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_step(jsonb, jsonb, text, text, boolean, text) IS
    'What is said of a step beside its name and what it waits for, in the words of load_definitions. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.load_definitions(workflow_slugs text[] DEFAULT NULL)
RETURNS TABLE (slug text, steps text[], deps text[], rules jsonb, when_failed text, failed_by text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY EXECUTE format($query$ -- one statement: a flow that is compiled in between can't mix two versions
        SELECT f.flow_slug,
               ARRAY(SELECT s.step_slug FROM pgflow.steps s WHERE s.flow_slug = f.flow_slug ORDER BY s.step_slug),
               ARRAY(SELECT ARRAY[d.dep_slug, d.step_slug] FROM pgflow.deps d WHERE d.flow_slug = f.flow_slug
                     ORDER BY d.dep_slug, d.step_slug),
               coalesce((SELECT jsonb_object_agg(s.step_slug, s.said) FROM (
                             SELECT s.step_slug, pgflow_prefect.describe_step(
                                        %1$s, %2$s, %3$s, %4$s, s.step_type = 'map',
                                        (SELECT min(d.dep_slug) FROM pgflow.deps d
                                         WHERE d.flow_slug = s.flow_slug AND d.step_slug = s.step_slug)) AS said
                             FROM pgflow.steps s WHERE s.flow_slug = f.flow_slug) s
                         WHERE s.said <> '{}'), '{}'),
               NULL::text, 'steps'::text
        FROM pgflow.flows f
        WHERE $1 IS NULL OR f.flow_slug = ANY ($1)
        ORDER BY f.flow_slug
        $query$,
        pgflow_prefect.find_column('steps', 'required_input_pattern', 's', 'jsonb'),
        pgflow_prefect.find_column('steps', 'forbidden_input_pattern', 's', 'jsonb'),
        pgflow_prefect.find_column('steps', 'when_unmet', 's', 'text'),
        pgflow_prefect.find_column('steps', 'when_exhausted', 's', 'text'))
        USING load_definitions.workflow_slugs;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.load_definitions(text[]) IS
    'These flows as they are defined now; NULL: all. A dep is a pair, upstream first. The rules tell conditions and maps.';


CREATE OR REPLACE FUNCTION pgflow_prefect.load_run_definition(run_id uuid)
RETURNS TABLE (slug text, steps text[], deps text[], rules jsonb, uses_rules boolean, continues boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY -- pgflow deletes the runs of a flow before it changes the flow
        SELECT d.slug, d.steps, d.deps, d.rules, d.rules <> '{}', false
        FROM pgflow.runs r CROSS JOIN LATERAL pgflow_prefect.load_definitions(ARRAY[r.flow_slug]) d
        WHERE r.run_id = load_run_definition.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.load_run_definition(uuid) IS
    'The definition of a run''s flow. No row: there is no such run.';


------------------------------------------------------------------------------------------------------------
-- Runs
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.describe_failure(run_id uuid) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN (SELECT format('step "%s" failed: %s', s.step_slug, coalesce(s.error_message, 'no reason given'))
            FROM pgflow.step_states s
            WHERE s.run_id = describe_failure.run_id AND s.status = 'failed'
            ORDER BY s.failed_at, s.step_slug
            LIMIT 1);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_failure(uuid) IS
    'Why a run has failed, which pgflow does not keep: the first step that failed, and its error. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_latest_run() RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY SELECT r.run_id FROM pgflow.runs r ORDER BY r.started_at DESC, r.run_id LIMIT 1;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_latest_run() IS
    'The run that began last; of several that began in one moment, one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_runs_between(first uuid, last uuid, at_most int) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT r.run_id FROM pgflow.runs r
        WHERE r.run_id BETWEEN find_runs_between.first AND find_runs_between.last
        ORDER BY r.run_id
        LIMIT find_runs_between.at_most;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_runs_between(uuid, uuid, int) IS
    'Runs whose ids lie between two, both included: several where the beginning of an id is not unique.';


------------------------------------------------------------------------------------------------------------
-- Steps
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_step_ends(run_id uuid, step_slugs text[])
RETURNS TABLE (step_slug text, status text, ended_as text, attempts int, error_message text, created_at timestamptz,
               started_at timestamptz, finished_at timestamptz, task_state text, handler text,
               first_claimed_at timestamptz, tasks int, tasks_completed int, skip_reason text,
               skip_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY EXECUTE format($query$
        SELECT s.step_slug,
               CASE s.status WHEN 'started' THEN 'pending' WHEN 'skipped' THEN 'completed' ELSE s.status END,
               NULL::text, coalesce(t.attempts, 0),
               CASE WHEN s.status = 'failed' THEN s.error_message
                    WHEN s.status = 'started' AND t.is_waiting THEN t.error_message END,
               coalesce(s.started_at, s.created_at), t.started_at,
               coalesce(s.completed_at, s.failed_at, %1$s),
               CASE WHEN s.status = 'started' AND t.is_waiting THEN 'AwaitingRetry' END,
               (SELECT w.function_name FROM pgflow.workers w WHERE w.worker_id = t.last_worker_id), NULL::timestamptz,
               CASE WHEN d.step_type = 'map' THEN s.initial_tasks END,
               CASE WHEN d.step_type = 'map' THEN coalesce(t.completed, 0) END,
               CASE WHEN s.status = 'skipped' THEN coalesce(%2$s, 'no reason given') END,
               CASE WHEN s.status = 'skipped' THEN
                   CASE %2$s WHEN 'condition_unmet' THEN 'its condition is not met'
                             WHEN 'dependency_skipped' THEN 'a step that it waits for was skipped'
                             WHEN 'handler_failed' THEN 'its handler failed: '
                                                        || coalesce(s.error_message, t.error_message, 'no reason given')
                             ELSE %2$s END END
        FROM pgflow.step_states s
        LEFT JOIN pgflow.steps d ON d.flow_slug = s.flow_slug AND d.step_slug = s.step_slug
        LEFT JOIN LATERAL (
            SELECT max(i.attempts_count) AS attempts, min(i.started_at) AS started_at,
                   count(*) FILTER (WHERE i.status = 'completed')::int AS completed,
                   (array_agg(i.last_worker_id ORDER BY i.started_at DESC NULLS LAST))[1] AS last_worker_id,
                   -- A failed attempt puts its task back into the queue, with the error.
                   bool_and(i.status <> 'started') AND bool_or(i.status = 'queued' AND i.attempts_count > 0) AS is_waiting,
                   max(i.error_message) FILTER (WHERE i.status IN ('queued', 'failed')) AS error_message
            FROM pgflow.step_tasks i WHERE i.run_id = s.run_id AND i.step_slug = s.step_slug OFFSET 0) t ON true
        WHERE s.run_id = $1 AND s.status <> 'created' AND ($2 IS NULL OR s.step_slug = ANY ($2))
        ORDER BY coalesce(s.started_at, s.created_at), s.step_slug
        $query$,
        pgflow_prefect.find_column('step_states', 'skipped_at', 's', 'timestamptz'),
        pgflow_prefect.find_column('step_states', 'skip_reason', 's', 'text'))
        USING list_step_ends.run_id, list_step_ends.step_slugs;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_step_ends(uuid, text[]) IS
    'How these steps of a run stand, those that have started, without their results; NULL: all. Of a map step, when '
    'its first task began, how many tasks it has, and how many of them are completed. AwaitingRetry: no task of the step is '
    'under way, and one that has failed is to be tried again.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_step_states(run_id uuid)
RETURNS TABLE (step_slug text, status text, ended_as text, attempts int, step_result jsonb, result_problem text,
               error_message text, created_at timestamptz, started_at timestamptz, finished_at timestamptz,
               task_state text, handler text, tasks int, tasks_completed int, skip_reason text,
               skip_message text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT e.step_slug, e.status, e.ended_as, e.attempts, CASE WHEN p.problem IS NULL THEN o.output END, p.problem,
               e.error_message, e.created_at, e.started_at, e.finished_at, e.task_state, e.handler,
               e.tasks, e.tasks_completed, e.skip_reason, e.skip_message
        FROM pgflow_prefect.list_step_ends(list_step_states.run_id, NULL) e
        LEFT JOIN LATERAL (
            SELECT CASE WHEN e.tasks IS NULL THEN (array_agg(t.output))[1] -- a plain step has one task
                        ELSE coalesce(jsonb_agg(t.output ORDER BY t.task_index), '[]') END AS output
            FROM pgflow.step_tasks t WHERE t.run_id = list_step_states.run_id AND t.step_slug = e.step_slug
            OFFSET 0) o ON e.status = 'completed' AND e.skip_reason IS NULL
        LEFT JOIN LATERAL (SELECT pgflow_prefect.find_json_problem(o.output) AS problem
                           WHERE o.output IS NOT NULL OFFSET 0) p ON true
        ORDER BY e.created_at, e.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_step_states(uuid) IS
    'The steps of a run that have started, in the order of their start, with their results: of a map step, an array.';


-- Rights: the owner's alone, until a role is granted EXECUTE. The version is set by the next script.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgflow_prefect FROM PUBLIC;

COMMIT;
