-- pgflow_prefect on the released pgflow (pgflow.dev): who does a moved step, or one of a moved flow, and what schedules start.
--
-- A part of the contract of ../CONTRACT.md; needs executing.sql. Rows bind a step to an SQL function, an endpoint, a queue or
-- a program. Only the owner of the schema, or a role that may write the table, binds steps.
-- psql -d DATABASE -f pgflow_prefect.sql -f moving.sql -f steps.sql -f executing.sql -f bindings.sql -f observing.sql; safe to
-- run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.item_claims') IS NULL THEN
        RAISE EXCEPTION 'the tables of pgflow_prefect for the released pgflow are missing'
            USING HINT = 'Run pgflow_prefect.sql, moving.sql and executing.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    -- This locks the schema itself: two installations at once take turns.
    COMMENT ON SCHEMA pgflow_prefect IS 'What pgflow-prefect reads and executes of the released pgflow.';
END
$guard$;


-- The handlers of steps. A row wins over the file of handlers, and takes effect at the next claim.
CREATE TABLE IF NOT EXISTS pgflow_prefect.bindings (
    workflow_slug TEXT NOT NULL,
    step_slug TEXT NOT NULL,
    kind TEXT NOT NULL,
    target TEXT,                   -- a function, the URL of an endpoint or a queue, or a name of a worker's settings
    options JSONB NOT NULL DEFAULT '{}',
    bound_by TEXT,                 -- this role must have the right to execute the target; NULL: from before version 6
    PRIMARY KEY (workflow_slug, step_slug),
    CONSTRAINT bindings_kind CHECK (kind IN ('python', 'external', 'sql', 'http', 'queue', 'command', 'work-pool')),
    CONSTRAINT bindings_target CHECK ((kind NOT IN ('python', 'external')) = (target IS NOT NULL)),
    -- A name of the worker's settings, and never what is started.
    CONSTRAINT bindings_name CHECK (
        kind NOT IN ('command', 'work-pool') OR target ~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$'),
    CONSTRAINT bindings_options CHECK (jsonb_typeof(options) = 'object'),
    -- Every role that may read runs may read these rows, so they must have no secrets.
    CONSTRAINT bindings_secret CHECK (
        kind NOT IN ('http', 'queue')
        OR (target !~ '^[^/?#]*//[^/?#]*@'
            AND target !~* '[?&;#]([a-z0-9_-]*(key|token|secret|password|passwd|signature|sig|pwd|jwt|credentials?)'
                '|([a-z0-9_-]*[_-])?(o?auth|pass|sas)|((access|api|auth|function|secret)[_-]?)?code)=')),
    CONSTRAINT bindings_options_secret CHECK (NOT options ?| ARRAY['token', 'password', 'secret', 'login', 'key'])
);

-- The history of bindings, also for `--undo`. NULL means no row.
CREATE TABLE IF NOT EXISTS pgflow_prefect.binding_changes (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow_slug TEXT NOT NULL,
    step_slug TEXT NOT NULL,
    before JSONB,
    after JSONB,
    changed_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    changed_by TEXT NOT NULL DEFAULT session_user,
    undone_at TIMESTAMPTZ,
    undone_by TEXT
);

-- The payload with which a schedule of Prefect starts runs. Who may write here decides with what scheduled runs begin.
CREATE TABLE IF NOT EXISTS pgflow_prefect.schedules (
    id UUID PRIMARY KEY,           -- the only thing that Prefect has of this row
    workflow_slug TEXT NOT NULL,
    name TEXT NOT NULL,
    payload JSONB NOT NULL,
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (workflow_slug, name)
);


------------------------------------------------------------------------------------------------------------
-- Bindings
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_functions(schema_name text, function_name text)
RETURNS TABLE (function_oid oid, owner oid)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    -- PostgreSQL may choose any of these for a call with one argument.
    SELECT p.oid, p.proowner
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = schema_name AND p.proname = function_name AND p.pronargs >= 1
      AND p.pronargs - p.pronargdefaults <= 1
$$;

COMMENT ON FUNCTION pgflow_prefect.find_functions(text, text) IS
    'The functions of this name that a call with one argument may call. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.may_execute(role_name text, schema_name text, function_name text)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT r.oid IS NOT NULL AND NOT EXISTS (
        SELECT FROM pgflow_prefect.find_functions(schema_name, function_name) f
        WHERE NOT has_function_privilege(r.oid, f.function_oid, 'EXECUTE')
           OR NOT has_schema_privilege(r.oid, to_regnamespace(quote_ident(schema_name)), 'USAGE'))
    FROM (VALUES (1)) AS one (row) LEFT JOIN pg_roles r ON r.rolname = role_name
$$;

COMMENT ON FUNCTION pgflow_prefect.may_execute(text, text, text) IS
    'Whether a role may execute each function of this name that a call with one argument may call. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.check_function(
    workflow_slug text, step_slug text, schema_name text, function_name text, trusted_owners text[], input jsonb
) RETURNS jsonb
LANGUAGE plpgsql VOLATILE -- the call takes its result as an argument, so this check comes first
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    called CONSTANT text := format('%I.%I', schema_name, function_name);
    binder text;
    distrusted text;
BEGIN
    SELECT f.owner::regrole::text INTO distrusted
    FROM pgflow_prefect.find_functions(schema_name, function_name) f JOIN pg_roles r ON r.oid = f.owner
    WHERE NOT r.rolsuper AND r.rolname <> ALL (coalesce(trusted_owners, '{}'))
      AND r.oid <> (SELECT nspowner FROM pg_namespace WHERE nspname = 'pgflow')
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'step "%" is bound by a row to %, whose owner % is not trusted here',
                        step_slug, called, distrusted
            USING ERRCODE = 'insufficient_privilege', CONSTRAINT = 'bindings_function',
                  HINT = format('Add %s to PGFLOW_FUNCTION_OWNERS where steps are executed, let the owner of the '
                                'schema pgflow own the function, or bind the step in Python.', distrusted);
    END IF;
    SELECT b.bound_by INTO binder FROM pgflow_prefect.bindings b
    WHERE b.workflow_slug = check_function.workflow_slug AND b.step_slug = check_function.step_slug;
    IF binder IS NOT NULL AND NOT pgflow_prefect.may_execute(binder, schema_name, function_name) THEN
        RAISE EXCEPTION 'step "%" is bound by a row to %, which % may not execute, who bound it',
                        step_slug, called, binder
            USING ERRCODE = 'insufficient_privilege', CONSTRAINT = 'bindings_function',
                  HINT = 'GRANT EXECUTE ON FUNCTION, and USAGE on its schema; or let a role bind it that may.';
    END IF;
    RETURN input;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.check_function(text, text, text, text, text[], jsonb) IS
    'Returns the input of a function that a row binds a step to. Refuses a function if its owner is no superuser, '
    'does not own the schema pgflow and is not trusted. Also refuses it if the role that bound the step may not '
    'execute it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.refuse_forbidden(role_name text, kind text, target text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    path text[];
BEGIN
    IF kind <> 'sql' THEN
        RETURN;
    END IF;
    BEGIN
        path := parse_ident(target);
    EXCEPTION WHEN invalid_parameter_value THEN
        RETURN; -- no such function: the worker says so, and `validate` before it
    END;
    IF NOT pgflow_prefect.may_execute(role_name, path[1], path[2]) THEN
        RAISE EXCEPTION '% can''t bind a step to %, which it may not execute', role_name, target
            USING ERRCODE = 'insufficient_privilege', CONSTRAINT = 'bindings_function',
                  HINT = 'The worker calls it with its own rights. GRANT EXECUTE ON FUNCTION, and USAGE on its schema.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.refuse_forbidden(text, text, text) IS
    'Refuses a binding to an SQL function that this role may not execute. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.change_binding(
    workflow_slug text, step_slug text, wanted jsonb, requested_by text
) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    before jsonb;
    after jsonb;
BEGIN
    SELECT to_jsonb(b) - '{workflow_slug,step_slug,bound_by}'::text[] INTO before FROM pgflow_prefect.bindings b
    WHERE b.workflow_slug = change_binding.workflow_slug AND b.step_slug = change_binding.step_slug;
    IF wanted IS NULL THEN
        DELETE FROM pgflow_prefect.bindings b
        WHERE b.workflow_slug = change_binding.workflow_slug AND b.step_slug = change_binding.step_slug;
    ELSE
        PERFORM pgflow_prefect.refuse_forbidden(requested_by, wanted ->> 'kind', wanted ->> 'target');
        INSERT INTO pgflow_prefect.bindings AS b (workflow_slug, step_slug, kind, target, options, bound_by)
        VALUES (change_binding.workflow_slug, change_binding.step_slug, wanted ->> 'kind', wanted ->> 'target',
                coalesce(wanted -> 'options', '{}'), change_binding.requested_by)
        ON CONFLICT (workflow_slug, step_slug) DO UPDATE
        SET kind = excluded.kind, target = excluded.target, options = excluded.options, bound_by = excluded.bound_by
        RETURNING to_jsonb(b) - '{workflow_slug,step_slug,bound_by}'::text[] INTO after;
    END IF;
    RETURN CASE WHEN after IS DISTINCT FROM before
                THEN jsonb_build_object('before', before, 'after', after) END;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.change_binding(text, text, jsonb, text) IS
    'Gives a step a binding, or none, and returns the change; NULL if nothing changed. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.begin_binding(workflow_slug text, step_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM pgflow.steps s
    WHERE s.flow_slug = begin_binding.workflow_slug AND s.step_slug = begin_binding.step_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'workflow "%" has no step "%"', begin_binding.workflow_slug, begin_binding.step_slug
            USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM pgflow_prefect.lock_moves();
    IF EXISTS (SELECT FROM pgflow_prefect.moved_flows m
               WHERE m.flow_slug = begin_binding.workflow_slug AND m.is_ours AND NOT m.by_steps) THEN
        RETURN true;
    END IF;
    -- A row that is left from a time when the whole flow was here means nothing now.
    DELETE FROM pgflow_prefect.bindings b
    WHERE b.workflow_slug = begin_binding.workflow_slug AND b.step_slug = begin_binding.step_slug
      AND NOT EXISTS (SELECT FROM pgflow_prefect.moved_steps m
                      WHERE m.flow_slug = b.workflow_slug AND m.step_slug = b.step_slug);
    RETURN false;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.begin_binding(text, text) IS
    'Locks the bindings, and tells whether the whole flow was moved. Otherwise a binding moves its step alone. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.apply_binding(workflow_slug text, step_slug text, wanted jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    is_whole boolean := pgflow_prefect.begin_binding(workflow_slug, step_slug);
    change jsonb;
BEGIN
    IF NOT is_whole AND wanted ->> 'kind' = 'external' THEN
        wanted := NULL; -- pgflow's own workers do it
    END IF;
    change := pgflow_prefect.change_binding(workflow_slug, step_slug, wanted, current_user);
    IF is_whole THEN
        RETURN change;
    ELSIF wanted IS NULL THEN
        PERFORM pgflow_prefect.move_step_back(workflow_slug, step_slug);
    ELSE
        PERFORM pgflow_prefect.move_step(workflow_slug, step_slug);
    END IF;
    RETURN change;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.apply_binding(text, text, jsonb) IS
    'change_binding; where the flow was not moved as a whole, it also moves the step, or gives it back. Internal.';


DROP FUNCTION IF EXISTS pgflow_prefect.refuse_binding(text, text);


CREATE OR REPLACE FUNCTION pgflow_prefect.bind_step(
    workflow_slug text, step_slug text, kind text, target text DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET lock_timeout = '10s'
AS $$
#variable_conflict use_column
DECLARE
    change jsonb;
BEGIN
    IF bind_step.kind = 'work-pool' THEN
        RAISE EXCEPTION 'step "%" can''t be bound to a work pool on the released pgflow', bind_step.step_slug
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Run a worker on the machine that the pool stands for.';
    ELSIF pgflow_prefect.find_json_problem(bind_step.options) IS NOT NULL OR octet_length(bind_step.options::text) > 10000 THEN
        RAISE EXCEPTION 'the options of a binding of step "%" have more than 10000 bytes as text', bind_step.step_slug
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    change := pgflow_prefect.apply_binding(
        bind_step.workflow_slug, bind_step.step_slug,
        CASE WHEN bind_step.kind IS NOT NULL
             THEN jsonb_build_object('kind', bind_step.kind, 'target', bind_step.target,
                                     'options', coalesce(bind_step.options, '{}')) END);
    IF change IS NULL THEN
        RETURN false;
    END IF;
    INSERT INTO pgflow_prefect.binding_changes (workflow_slug, step_slug, before, after)
    VALUES (bind_step.workflow_slug, bind_step.step_slug, nullif(change -> 'before', 'null'),
            nullif(change -> 'after', 'null'));
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.bind_step(text, text, text, text, jsonb) IS
    'Binds a step from its next claim on: python, external, sql, http, queue, command; NULL deletes the row. Of a flow that '
    'was not moved, this moves the step alone, and NULL or external gives it back. False if nothing changed. For secrets, '
    'targets and options name environment variables or Prefect blocks.';


CREATE OR REPLACE FUNCTION pgflow_prefect.undo_binding(workflow_slug text, step_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET lock_timeout = '10s'
AS $$
#variable_conflict use_column
DECLARE
    undone pgflow_prefect.binding_changes;
BEGIN
    PERFORM pgflow_prefect.begin_binding(undo_binding.workflow_slug, undo_binding.step_slug);
    SELECT * INTO undone FROM pgflow_prefect.binding_changes c
    WHERE c.workflow_slug = undo_binding.workflow_slug AND c.step_slug = undo_binding.step_slug AND c.undone_at IS NULL
    ORDER BY c.id DESC LIMIT 1;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM pgflow_prefect.apply_binding(undo_binding.workflow_slug, undo_binding.step_slug, undone.before);
    UPDATE pgflow_prefect.binding_changes c SET undone_at = clock_timestamp(), undone_by = session_user
    WHERE c.id = undone.id;
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.undo_binding(text, text) IS
    'Undoes the last change of a step''s binding that was not undone yet; false if there is none. It moves the step as '
    'bind_step does.';


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
        SELECT m.flow_slug FROM pgflow_prefect.moved_flows m
        WHERE m.is_ours AND EXISTS (SELECT FROM pgflow_prefect.bindings b WHERE b.workflow_slug = m.flow_slug)
          AND NOT EXISTS (
              SELECT FROM pgflow.steps s
              LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = s.flow_slug AND b.step_slug = s.step_slug
              WHERE s.flow_slug = m.flow_slug AND (b.kind IS NULL OR b.kind = 'python')
                AND (NOT m.by_steps OR EXISTS (SELECT FROM pgflow_prefect.moved_steps p
                                               WHERE p.flow_slug = s.flow_slug AND p.step_slug = s.step_slug)))
        ORDER BY m.flow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_bound_workflows() IS
    'The moved flows that need no Python: rows bind all their moved steps, and none of them to Python.';


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


------------------------------------------------------------------------------------------------------------
-- Consumers of queues, which report for the owner of a run, whichever that is
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_handover(run_id uuid, step_slug text, task_index int, attempt int)
RETURNS TABLE (awaited boolean, workflow_slug text, handler text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT coalesce(r.status = 'started' AND pgflow_prefect.is_claimed(t, m.worker_id, find_handover.attempt), false),
               r.flow_slug, c.handler
        FROM pgflow.runs r
        LEFT JOIN pgflow.step_tasks t ON t.run_id = r.run_id AND t.step_slug = find_handover.step_slug
                                     AND t.task_index = find_handover.task_index
        LEFT JOIN pgflow_prefect.moved_flows m ON m.flow_slug = r.flow_slug
        LEFT JOIN pgflow_prefect.task_runs c ON c.run_id = r.run_id AND c.step_slug = find_handover.step_slug
                                            AND c.task_index = 0
        WHERE r.run_id = find_handover.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_handover(uuid, text, int, int) IS
    'Whether the report of this attempt is awaited, the flow, and who it was claimed for. No row: the run is gone.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_completion(
    run_id uuid, step_slug text, task_index int, step_result jsonb, attempt int, outcome jsonb
) RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    RETURN (SELECT c.status FROM pgflow_prefect.complete_task(run_id, step_slug, task_index, step_result, NULL, attempt,
                                                              NULL, outcome) c);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_completion(uuid, text, int, jsonb, int, jsonb) IS
    'Stores the result of an attempt, whichever owner the run has; returns the status of its step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_failure(
    run_id uuid, step_slug text, task_index int, error_message text, attempt int
) RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    RETURN (SELECT f.status FROM pgflow_prefect.fail_task(run_id, step_slug, task_index, error_message, NULL, attempt, NULL,
                                                          'Failed') f);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_failure(uuid, text, int, text, int) IS
    'Fails an attempt, whichever owner the run has: pgflow decides whether it tries the task again.';


------------------------------------------------------------------------------------------------------------
-- Schedules
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.check_payload(payload jsonb, name text) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    problem text := pgflow_prefect.find_json_problem(payload);
BEGIN
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION 'the payload of schedule "%" %', name, problem
            USING ERRCODE = 'program_limit_exceeded', CONSTRAINT = 'json_limits';
    END IF;
    RETURN payload;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.check_payload(jsonb, text) IS
    'Returns the payload of a schedule; raises an error if it is beyond the limits. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.write_schedule(id uuid, workflow_slug text, name text, payload jsonb)
RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    written uuid;
BEGIN
    PERFORM FROM pgflow.flows f WHERE f.flow_slug = write_schedule.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow_prefect.schedules AS s (id, workflow_slug, name, payload)
    VALUES (write_schedule.id, write_schedule.workflow_slug, write_schedule.name,
            pgflow_prefect.check_payload(write_schedule.payload, write_schedule.name))
    ON CONFLICT (workflow_slug, name) DO UPDATE SET payload = excluded.payload, updated_at = excluded.updated_at
    RETURNING s.id INTO written;
    RETURN written;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.write_schedule(uuid, text, text, jsonb) IS
    'Stores the payload of a schedule, and returns the id of its row: of a schedule that has a row, the former id.';


CREATE OR REPLACE FUNCTION pgflow_prefect.delete_schedules(ids uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    RETURN QUERY DELETE FROM pgflow_prefect.schedules s WHERE s.id = ANY (ids) RETURNING s.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.delete_schedules(uuid[]) IS
    'Deletes the payloads of schedules, and returns the ids of the rows that there were.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_schedules(workflow_slugs text[])
RETURNS TABLE (id uuid, workflow_slug text, name text, payload jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.id, s.workflow_slug, s.name,
               CASE WHEN pgflow_prefect.find_json_problem(s.payload) IS NULL THEN s.payload END
        FROM pgflow_prefect.schedules s
        WHERE list_schedules.workflow_slugs IS NULL OR s.workflow_slug = ANY (list_schedules.workflow_slugs)
        ORDER BY s.workflow_slug, s.name;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_schedules(text[]) IS
    'The payloads of the schedules of these workflows, or of all. A payload beyond the limits is NULL.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_schedule(id uuid)
RETURNS TABLE (workflow_slug text, name text, payload jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.workflow_slug, s.name,
               pgflow_prefect.check_payload(s.payload, s.name)
        FROM pgflow_prefect.schedules s WHERE s.id = read_schedule.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_schedule(uuid) IS
    'The workflow, the name and the payload of a schedule. No row: there is none of this id.';


-- Rights: the owner's alone, until a role is granted EXECUTE. The version is set by the last script.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgflow_prefect FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA pgflow_prefect FROM PUBLIC;

COMMIT;
