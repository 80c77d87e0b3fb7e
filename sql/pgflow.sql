-- pgflow: a workflow engine in PostgreSQL.
--
-- Workflows, steps and dependencies are rows; a run and the state of each of its steps are rows; the
-- functions below move them. Paste this file into an SQL editor, or: psql -d DATABASE -f pgflow.sql
-- PostgreSQL 13 or later. One transaction, safe to run again: on a current database it locks no table. An upgrade by
-- hand builds new indexes under a lock: where a table has millions of rows, use `pgflow-prefect init`, which does not.
-- It also upgrades a database that was made with pgflow's first five tables, and changes none of its rows. A database
-- of an older version of this script keeps its rows, too; the script notes which of its failed runs were cancelled.
--
-- What users call                                    in short
--   run_workflow(workflow_slug, payload [, run_id])  start a run: its root steps become pending
--   start_step(run_id, step_slug)                    make a step pending, if its upstream steps are completed
--   claim_step(run_id, step_slug [, epoch ...])        count an attempt and get the step's input
--   complete_step(run_id, step_slug, step_result ...)  store a result, start what became ready
--   fail_step(run_id, step_slug, error_message ...)    fail the step and its run
--   has_unmet_deps, get_root_steps, get_ready_steps  what can start
--   skip_step(run_id, step_slug [, note, cascade ...]) skip a step, with or without what is below it
--   take_branches(run_id, step_slug, taken ...)        complete a step that chooses which of its branches are taken
--   claim_items, complete_items, fail_items, skip_items  the items of a map: a step that is executed once for each
--   cancel_run, fail_run, reopen_run                 end a run, and make it pending again
--   take_run, repair_run                             the life of a run
--   start_backfill(workflow_slug, dates ...)         start a run for each date, so many at a time
--
-- Errors: P0002 unknown workflow, run or step; 55000 not ready, finished, or fenced off; 22023 invalid; 09000 a trigger
-- or rule of yours skipped a write; 55P03 another transaction locks the workflow for too long.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';          -- behind a long transaction: give up rather than make all other sessions queue behind us
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning; -- a second run has nothing to announce
SET LOCAL pgflow.script_version = 6;     -- engine_version refuses an older one, and one that does not say it

DO $guard$
DECLARE
    existed boolean := to_regnamespace('pgflow') IS NOT NULL;
    former_version int := 0;
    foreign_table text;
BEGIN
    IF current_setting('server_version_num')::int < 130000 THEN
        RAISE EXCEPTION 'pgflow needs PostgreSQL 13 or later, this server is %', current_setting('server_version')
            USING ERRCODE = 'feature_not_supported';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    SELECT c.relname INTO foreign_table
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'pgflow'
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND NOT EXISTS (SELECT FROM pg_catalog.pg_class w JOIN pg_catalog.pg_attribute a ON a.attrelid = w.oid
                      WHERE w.relnamespace = n.oid AND w.relname = 'workflows' AND a.attname = 'slug')
    ORDER BY c.relname <> 'flows', c.relname LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the schema pgflow of this database belongs to another program: it has pgflow.%, and no '
                        'pgflow.workflows with a slug', foreign_table
            USING ERRCODE = 'duplicate_schema',
                  HINT = 'Use another database. The pgflow that npm has (pgflow.dev) has a schema of this name, too.';
    END IF;
    BEGIN
        CREATE SCHEMA IF NOT EXISTS pgflow;
    EXCEPTION WHEN unique_violation OR duplicate_schema THEN
        existed := true; -- another installation was faster
    END;
    -- As pgflow.lock_schema does below. Two installations at once take turns.
    BEGIN
        EXECUTE format('COMMENT ON SCHEMA pgflow IS %L', obj_description('pgflow'::regnamespace, 'pg_namespace'));
    EXCEPTION WHEN insufficient_privilege THEN
        PERFORM pg_catalog.pg_advisory_xact_lock(7031902210563);
    END;
    PERFORM set_config('pgflow.known_objects', concat_ws(
        ' ', CASE WHEN existed THEN 'schema' END,
        (SELECT string_agg(classid || '/' || objid, ' ') FROM pg_catalog.pg_depend
         WHERE refclassid = 'pg_namespace'::regclass AND refobjid = 'pgflow'::regnamespace)), true);
    IF to_regprocedure('pgflow.engine_version()') IS NOT NULL THEN
        EXECUTE 'SELECT pgflow.engine_version()' INTO former_version;
    END IF;
    IF former_version > 6 THEN
        RAISE EXCEPTION 'the schema pgflow has version %, and this script installs version 6', former_version
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
    PERFORM set_config('pgflow.former_version', former_version::text, true);
END
$guard$;


------------------------------------------------------------------------------------------------------------
-- What the scripts begin and end with
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.lock_schema(schema_name text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    existed boolean := to_regnamespace(quote_ident(schema_name)) IS NOT NULL;
BEGIN
    BEGIN
        EXECUTE format('CREATE SCHEMA IF NOT EXISTS %I', schema_name);
    EXCEPTION WHEN unique_violation OR duplicate_schema THEN
        existed := true;
    END;
    -- COMMENT locks the schema itself, and only its owner may say it: no other role can keep a script waiting.
    -- An owner of the tables who does not own the schema is left with a lock that every role can take.
    BEGIN
        EXECUTE format('COMMENT ON SCHEMA %I IS %L', schema_name,
                       obj_description(to_regnamespace(quote_ident(schema_name)), 'pg_namespace'));
    EXCEPTION WHEN insufficient_privilege THEN
        PERFORM pg_advisory_xact_lock(7031902210563);
    END;
    PERFORM set_config('pgflow.known_objects', concat_ws(
        ' ', CASE WHEN existed THEN 'schema' END,
        (SELECT string_agg(classid || '/' || objid, ' ') FROM pg_depend
         WHERE refclassid = 'pg_namespace'::regclass
           AND refobjid = to_regnamespace(quote_ident(schema_name)))), true);
    PERFORM pgflow.engine_version();
END
$$;

COMMENT ON FUNCTION pgflow.lock_schema(text) IS
    'Creates a schema, locks it against other scripts until the transaction ends, and remembers what is in it. Refuses a '
    'script of an older version. Internal.';


CREATE OR REPLACE FUNCTION pgflow.close_schema(schema_name text, also_known boolean DEFAULT false) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    known CONSTANT text[] := string_to_array(current_setting('pgflow.known_objects'), ' ');
    opened record;
BEGIN
    -- A new object begins with the rights of PUBLIC, and with those that default privileges give. None of that was
    -- said of this schema, so it goes; default privileges IN SCHEMA were, and stay. An object that was there before
    -- keeps its rights: they are an administrator's decision. But no trigger function is PUBLIC's.
    FOR opened IN
        WITH object AS (
            SELECT 'FUNCTION' AS kind, 'f' AS letter, 'pg_proc'::regclass::oid || '/' || oid AS id,
                   oid::regprocedure::text AS name, proowner AS owner,
                   coalesce(proacl, acldefault('f', proowner)) AS acl,
                   also_known OR prorettype = 'trigger'::regtype AS closes
            FROM pg_proc WHERE pronamespace = to_regnamespace(quote_ident(schema_name)) AND prokind = 'f'
            UNION ALL
            SELECT CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, CASE relkind WHEN 'S' THEN 'S' ELSE 'r' END,
                   'pg_class'::regclass::oid || '/' || oid, oid::regclass::text, relowner, relacl, false
            FROM pg_class
            WHERE relnamespace = to_regnamespace(quote_ident(schema_name)) AND relkind IN ('r', 'p', 'v', 'm', 'S')
            UNION ALL
            SELECT 'SCHEMA', 'n', 'schema', quote_ident(nspname), nspowner, nspacl, false
            FROM pg_namespace WHERE nspname = schema_name
        )
        SELECT DISTINCT o.kind, o.name, CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
        FROM object o CROSS JOIN LATERAL aclexplode(o.acl) r
        WHERE r.grantee <> o.owner
          AND CASE WHEN o.id = ANY (known) THEN o.closes AND r.grantee = 0
                   ELSE NOT EXISTS (
                       SELECT FROM pg_default_acl d CROSS JOIN LATERAL aclexplode(d.defaclacl) said
                       WHERE d.defaclnamespace = to_regnamespace(quote_ident(schema_name))
                         AND d.defaclrole = o.owner AND d.defaclobjtype = o.letter::"char" AND said.grantee = r.grantee) END
    LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %s CASCADE', opened.kind, opened.name, opened.grantee);
    END LOOP;
    -- A function has the rights of its caller. A role that could call one before an upgrade goes on, and so it needs
    -- the new functions that its new body calls.
    FOR opened IN
        WITH RECURSIVE routine AS (
            SELECT p.oid, p.prosrc, p.proowner, p.proacl, n.nspname || '.' || p.proname || '(' AS call
            FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname IN ('pgflow', 'pgflow_prefect') AND p.prokind = 'f' AND NOT p.prosecdef
              AND p.prorettype <> 'trigger'::regtype
        ), granted (routine, grantee) AS (
            SELECT r.oid, a.grantee FROM routine r CROSS JOIN LATERAL aclexplode(r.proacl) a
            WHERE a.grantee NOT IN (0, r.proowner)
            UNION
            SELECT called.oid, g.grantee
            FROM granted g JOIN routine caller ON caller.oid = g.routine
            JOIN routine called ON called.oid <> caller.oid AND strpos(caller.prosrc, called.call) > 0
        )
        SELECT r.oid::regprocedure::text AS name, g.grantee::regrole::text AS grantee
        FROM granted g JOIN routine r ON r.oid = g.routine
        WHERE r.call LIKE schema_name || '.%' AND ('pg_proc'::regclass::oid || '/' || r.oid <> ALL (known))
          AND NOT has_function_privilege(g.grantee, r.oid, 'EXECUTE')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', opened.name, opened.grantee);
    END LOOP;
    -- The next version of a worker calls new functions itself. A role that could hand runs back works, and gets those
    -- that write, except for the owner's; a role that could list processes gets those that read. What these call, too.
    FOR opened IN
        WITH RECURSIVE routine AS (
            SELECT p.oid, p.proname, p.prosrc, p.proowner, p.proacl, p.provolatile, n.nspname,
                   n.nspname || '.' || p.proname || '(' AS call
            FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
            WHERE n.nspname IN ('pgflow', 'pgflow_prefect') AND p.prokind = 'f' AND NOT p.prosecdef
              AND p.prorettype <> 'trigger'::regtype
              AND p.proname !~ '^(new_installation|move_installation|change_binding|prune_|find_prunable|choose_prunable)'
              AND p.proname !~ '^(find_gone_runs|name_airflow_dags|remove_airflow_dags)'
        ), granted (routine, grantee) AS (
            SELECT made.oid, a.grantee
            FROM routine made
            JOIN routine model ON model.nspname = made.nspname
                              AND model.proname = CASE made.provolatile WHEN 'v' THEN 'release_run' ELSE 'list_holders' END
            CROSS JOIN LATERAL aclexplode(model.proacl) a
            WHERE made.nspname = 'pgflow_prefect' AND schema_name = made.nspname AND a.grantee NOT IN (0, made.proowner)
              AND 'pg_proc'::regclass::oid || '/' || model.oid = ANY (known)
              AND 'pg_proc'::regclass::oid || '/' || made.oid <> ALL (known)
            UNION
            SELECT called.oid, g.grantee
            FROM granted g JOIN routine caller ON caller.oid = g.routine
            JOIN routine called ON called.oid <> caller.oid AND strpos(caller.prosrc, called.call) > 0
        )
        SELECT g.routine::regprocedure::text AS name, g.grantee::regrole::text AS grantee
        FROM granted g WHERE NOT has_function_privilege(g.grantee, g.routine, 'EXECUTE')
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %s', opened.name, opened.grantee);
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.close_schema(text, boolean) IS
    'Takes every right from others than the owner on what a script has created since lock_schema; also_known: from '
    'PUBLIC on the functions that were there before, too. Who may call one of those may call the new ones that it calls, '
    'and those that the next version of a worker calls. Internal.';


CREATE OR REPLACE FUNCTION pgflow.hand_on_rights(model regclass, rights text[], VARIADIC made regclass[])
RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    known CONSTANT text[] := string_to_array(current_setting('pgflow.known_objects'), ' ');
    granted record;
BEGIN
    FOR granted IN
        SELECT DISTINCT r.privilege_type AS "right", m.name, r.is_grantable,
               CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
        FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) r CROSS JOIN unnest(made) AS m (name)
        WHERE c.oid = model AND r.grantee <> c.relowner
          AND r.privilege_type = ANY (rights)
          AND 'pg_class'::regclass::oid || '/' || m.name::oid <> ALL (known)
    LOOP
        EXECUTE format('GRANT %s ON %s TO %s%s', granted."right", granted.name, granted.grantee,
                       CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.hand_on_rights(regclass, text[], regclass[]) IS
    'Gives those who have these rights on a table the same rights on tables that a script has created since lock_schema: '
    'functions that they could call before an upgrade now use these. After close_schema. Internal.';


CREATE OR REPLACE FUNCTION pgflow.pause_reactions(VARIADIC tables regclass[]) RETURNS text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    reaction record;
    restore text := 'SELECT';
BEGIN
    FOR reaction IN
        SELECT found.*, format('%I.%I', n.nspname, c.relname) AS on_table -- for the caller's search_path
        FROM (SELECT 'TRIGGER' AS kind, tgname AS name, tgrelid AS relation, tgenabled AS state
              FROM pg_trigger WHERE NOT tgisinternal
              UNION ALL
              SELECT 'RULE', rulename, ev_class, ev_enabled FROM pg_rewrite) found
        JOIN pg_class c ON c.oid = found.relation JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = ANY (tables) AND found.state <> 'D'
    LOOP
        EXECUTE format('ALTER TABLE %s DISABLE %s %I', reaction.on_table, reaction.kind, reaction.name);
        restore := restore || format('; ALTER TABLE %s ENABLE %s %s %I', reaction.on_table,
                                     CASE reaction.state WHEN 'A' THEN 'ALWAYS' WHEN 'R' THEN 'REPLICA' ELSE '' END,
                                     reaction.kind, reaction.name);
    END LOOP;
    RETURN restore;
END
$$;

COMMENT ON FUNCTION pgflow.pause_reactions(regclass[]) IS
    'Disables the triggers and rules of tables, so that an upgrade writes a note into rows of the past and nothing '
    'reacts to it. Returns the SQL that enables them as they were, for the same transaction. Internal.';


CREATE OR REPLACE FUNCTION pgflow.reserve_pages(schema_name text, table_names text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    reserved record;
    known CONSTANT text[] := string_to_array(current_setting('pgflow.known_objects'), ' ');
    dropped text;
    restored text;
BEGIN
    FOR reserved IN
        SELECT c.oid::regclass AS name, ('pg_class'::regclass::oid || '/' || c.oid) <> ALL (known) AS is_new,
               string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) AS columns,
               string_agg(CASE WHEN a.atttypid = 'uuid'::regtype THEN 'gen_random_uuid()'
                               -- One long text: a row of 2 kB would be compressed, and fill no page. In an index it is
                               -- compressed, and has to be: an index with many pages for few rows would not be used.
                               WHEN a.attnum = t.long_text THEN 'n || repeat(''x'', 1800)'
                               WHEN a.atttypid = 'text'::regtype THEN 'n'
                               WHEN a.atttypid IN ('int4'::regtype, 'int8'::regtype, 'float8'::regtype) THEN 'n'
                               WHEN a.atttypid = 'timestamptz'::regtype THEN 'now()'
                               WHEN a.atttypid = 'bool'::regtype THEN 'true'
                               ELSE '''{}''' END, ', ' ORDER BY a.attnum) AS filler,
               CASE WHEN 'text'::regtype = ANY (array_agg(a.atttypid)) THEN 64 ELSE 2400 END AS rows
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND a.attnotnull
        CROSS JOIN LATERAL (SELECT min(b.attnum) AS long_text FROM pg_attribute b
                            WHERE b.attrelid = c.oid AND b.attnum > 0 AND b.attnotnull
                              AND b.atttypid = 'text'::regtype) t
        WHERE c.relnamespace = to_regnamespace(quote_ident(schema_name)) AND c.relname = ANY (table_names)
          AND 'vacuum_truncate=false' <> ALL (coalesce(c.reloptions, '{}'))
        GROUP BY c.oid
    LOOP
        EXECUTE format('ALTER TABLE %s SET (vacuum_truncate = false)', reserved.name); -- or they would be given back
        CONTINUE WHEN NOT reserved.is_new; -- with rows and triggers of its users
        -- Without what the filling rows would violate, for as long as they are there.
        SELECT string_agg(format('DROP CONSTRAINT %I', conname), ', '),
               string_agg(format('ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)), ', ')
        INTO dropped, restored
        FROM pg_constraint WHERE conrelid = reserved.name AND contype IN ('c', 'f');
        EXECUTE coalesce('ALTER TABLE ' || reserved.name || ' ' || dropped, 'SELECT');
        EXECUTE format('INSERT INTO %s (%s) OVERRIDING SYSTEM VALUE SELECT %s FROM generate_series(1, %s) AS n',
                       reserved.name, reserved.columns, reserved.filler, reserved.rows);
        EXECUTE format('DELETE FROM %s', reserved.name);
        EXECUTE coalesce('ALTER TABLE ' || reserved.name || ' ' || restored, 'SELECT');
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.reserve_pages(text, text[]) IS
    'Gives tables that a script has just created 16 empty pages for good. Where a table is analyzed while it has one '
    'page, a session plans to scan it, and keeps that plan however large the table grows: also that of the check of a '
    'foreign key. With 16 pages the index is always cheaper. So no statement needs a planner setting, which the '
    'triggers of users would find as well. Internal.';


------------------------------------------------------------------------------------------------------------
-- Definition: what a user writes
------------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS pgflow.workflows (
    slug TEXT PRIMARY KEY NOT NULL
);

CREATE TABLE IF NOT EXISTS pgflow.steps (
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug),
    slug TEXT NOT NULL,
    PRIMARY KEY (workflow_slug, slug)
);

CREATE TABLE IF NOT EXISTS pgflow.deps (
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug),
    from_step_slug TEXT NOT NULL,  -- must complete first
    to_step_slug TEXT NOT NULL,    -- depends on from_step_slug
    PRIMARY KEY (workflow_slug, from_step_slug, to_step_slug),
    FOREIGN KEY (workflow_slug, from_step_slug) REFERENCES pgflow.steps (workflow_slug, slug),
    FOREIGN KEY (workflow_slug, to_step_slug) REFERENCES pgflow.steps (workflow_slug, slug),
    CHECK (from_step_slug != to_step_slug)
);


------------------------------------------------------------------------------------------------------------
-- Execution: what happens
------------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS pgflow.runs (
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug),
    id UUID PRIMARY KEY NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending',
    payload JSONB NOT NULL,
    CHECK (status IN ('pending', 'failed', 'completed'))
);

CREATE TABLE IF NOT EXISTS pgflow.step_states (
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug),
    run_id UUID NOT NULL REFERENCES pgflow.runs (id),
    step_slug TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending',
    step_result JSONB,
    PRIMARY KEY (run_id, step_slug),
    FOREIGN KEY (workflow_slug, step_slug) REFERENCES pgflow.steps (workflow_slug, slug),
    CHECK (status IN ('pending', 'failed', 'completed'))
);


------------------------------------------------------------------------------------------------------------
-- Snapshots: the definition that a run began with, immutable
------------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS pgflow.definitions (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug) ON DELETE CASCADE,
    version BIGINT NOT NULL,
    step_count INT NOT NULL,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (workflow_slug, version)
);

CREATE TABLE IF NOT EXISTS pgflow.definition_steps (
    definition_id BIGINT NOT NULL REFERENCES pgflow.definitions (id) ON DELETE CASCADE,
    slug TEXT NOT NULL,
    in_degree INT NOT NULL,
    PRIMARY KEY (definition_id, slug)
);

CREATE TABLE IF NOT EXISTS pgflow.definition_deps (
    definition_id BIGINT NOT NULL REFERENCES pgflow.definitions (id) ON DELETE CASCADE,
    from_step_slug TEXT NOT NULL,
    to_step_slug TEXT NOT NULL,
    to_in_degree INT NOT NULL,     -- how many upstream steps to_step_slug has: a completion need not look it up
    PRIMARY KEY (definition_id, from_step_slug, to_step_slug)
);

-- A step with several upstream steps of which some, not all, are completed: how many are still missing.
CREATE TABLE IF NOT EXISTS pgflow.waiting_steps (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    unmet INT NOT NULL,
    PRIMARY KEY (run_id, step_slug)
);

-- How many attempts a step had that a reopened run has made undecided: no number is used twice.
CREATE TABLE IF NOT EXISTS pgflow.undone_steps (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    attempts INT NOT NULL,
    PRIMARY KEY (run_id, step_slug)
);

-- A step that is a map: how many items it has, and how many have not ended.
CREATE TABLE IF NOT EXISTS pgflow.step_maps (
    run_id UUID NOT NULL,
    step_slug TEXT NOT NULL,
    total INT NOT NULL,
    remaining INT NOT NULL,        -- items that have not ended
    failed INT NOT NULL DEFAULT 0,
    next_item INT NOT NULL DEFAULT 0, -- no item from this one on was ever claimed
    former_attempts INT NOT NULL DEFAULT 0, -- with which its items begin: no number of an attempt is used twice
    epoch INT NOT NULL,            -- of the latest owner that has claimed items
    PRIMARY KEY (run_id, step_slug),
    FOREIGN KEY (run_id, step_slug) REFERENCES pgflow.step_states (run_id, step_slug) ON DELETE CASCADE
) WITH (fillfactor = 10);          -- every claim and every report updates the row, in place

-- The items of a map, in the order of its array. They are rows from the moment that the map starts.
CREATE TABLE IF NOT EXISTS pgflow.step_items (
    run_id UUID NOT NULL,
    step_slug TEXT NOT NULL,
    item_index INT NOT NULL,
    item JSONB NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending', -- pending, failed, completed; no CHECK, as in step_states
    attempts INT NOT NULL DEFAULT 0,
    item_result JSONB,
    skip_reason TEXT,              -- a completed item that is left out of the map's result
    error_message TEXT,            -- of the latest failed attempt; of an item that is left out, a note for people
    claimed_in INT,                -- the epoch of the owner that has claimed it without a lease
    started_at TIMESTAMPTZ,        -- of the latest attempt; NULL: not claimed
    finished_at TIMESTAMPTZ,
    due_at TIMESTAMPTZ,            -- from then on it can be claimed again; NULL: not before it is reported
    PRIMARY KEY (run_id, step_slug, item_index),
    FOREIGN KEY (run_id, step_slug) REFERENCES pgflow.step_maps (run_id, step_slug) ON DELETE CASCADE
) WITH (fillfactor = 60);

-- Children whose step does not wait for them any more, or waits again. A transaction that holds the parent's row may not
-- wait for that of a child: see the section on children. No key but its own, so that no insert waits for another one.
CREATE TABLE IF NOT EXISTS pgflow.child_requests (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id UUID NOT NULL           -- the child; no foreign key: a run may be deleted before
);

-- Runs of a workflow for dates of the past: a row a backfill, and a row a date.
CREATE TABLE IF NOT EXISTS pgflow.backfills (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug) ON DELETE CASCADE,
    status TEXT NOT NULL DEFAULT 'running' CHECK (status IN ('running', 'paused', 'cancelled', 'completed')),
    payload JSONB NOT NULL DEFAULT '{}',
    max_active INT NOT NULL DEFAULT 1 CHECK (max_active BETWEEN 1 AND 1000), -- runs under way at once
    on_existing TEXT NOT NULL DEFAULT 'none' CHECK (on_existing IN ('none', 'failed', 'all')),
    newest_first BOOLEAN NOT NULL DEFAULT false,
    stop_on_failure BOOLEAN NOT NULL DEFAULT false, -- a run that fails pauses it
    schedule TEXT,                 -- which made the dates, for people
    note TEXT,                     -- why it is paused, or was cancelled
    created_by TEXT NOT NULL DEFAULT session_user,
    created_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    finished_at TIMESTAMPTZ        -- no date is planned or under way any more
);

CREATE TABLE IF NOT EXISTS pgflow.backfill_dates (
    backfill_id BIGINT NOT NULL REFERENCES pgflow.backfills (id) ON DELETE CASCADE,
    logical_date TIMESTAMPTZ NOT NULL,
    data_interval TSTZRANGE,
    state TEXT NOT NULL DEFAULT 'planned' CHECK (state IN ('planned', 'started', 'ended', 'left')),
    run_id UUID,                   -- no foreign key: a run may be deleted before
    note TEXT,                     -- why it was left
    PRIMARY KEY (backfill_id, logical_date)
);

-- The limits of payloads and results, for every statement. The owner changes them: UPDATE pgflow.limits SET ...
-- Lower limits would not work, because the triggers let small values pass without reading them.
CREATE TABLE IF NOT EXISTS pgflow.limits (
    is_only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (is_only_row),
    payload_bytes INT NOT NULL DEFAULT 33554432 CHECK (payload_bytes >= 1000), -- as text, where 1e300 has 301 digits
    result_bytes INT NOT NULL DEFAULT 33554432 CHECK (result_bytes >= 1000),
    depth INT NOT NULL DEFAULT 200 CHECK (depth BETWEEN 100 AND 250),          -- arrays and objects in one another
    digits INT NOT NULL DEFAULT 1000 CHECK (digits BETWEEN 1000 AND 4300)      -- of a number, on either side of its point
);

CREATE OR REPLACE FUNCTION pgflow.replace_limits() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
BEGIN
    DELETE FROM pgflow.limits; -- the row that this script made: a dump of data brings its own
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow.replace_limits() IS
    'Lets the data of another database be restored here, its limits with it.';

DO $limits$
DECLARE
    state "char";
BEGIN
    -- No ON CONFLICT: the trigger comes first, and would take the owner's limits away.
    INSERT INTO pgflow.limits (is_only_row) SELECT true WHERE NOT EXISTS (SELECT FROM pgflow.limits);
    SELECT tgenabled INTO state FROM pg_catalog.pg_trigger
    WHERE tgrelid = 'pgflow.limits'::regclass AND tgname = 'replace_limits';
    IF NOT FOUND THEN
        CREATE TRIGGER replace_limits BEFORE INSERT ON pgflow.limits
            FOR EACH ROW EXECUTE FUNCTION pgflow.replace_limits();
    END IF;
    IF coalesce(state, 'O') = 'O' THEN -- disabled: an administrator's decision
        ALTER TABLE pgflow.limits ENABLE ALWAYS TRIGGER replace_limits;
    END IF;
END
$limits$;

-- Columns and indexes that the first five tables lack. IF NOT EXISTS would lock a table even if there is nothing to
-- do, and would stop a live database. So this reads the catalog.
DO $columns$
DECLARE
    granted record;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.workflows'::regclass AND attname = 'version') THEN
        ALTER TABLE pgflow.workflows
            ADD COLUMN version BIGINT NOT NULL DEFAULT 1,   -- raised by an edit of steps or deps
            ADD COLUMN edited_in XID8;                      -- the transaction that raised it last
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'definition_id') THEN
        ALTER TABLE pgflow.runs
            -- No foreign key: a definition goes with its workflow, which waits for its runs to go, or after
            -- all runs that began with it.
            ADD COLUMN definition_id BIGINT,                -- NULL: inserted by hand, not yet moved
            ADD COLUMN remaining INT,                       -- steps not completed
            ADD COLUMN epoch INT NOT NULL DEFAULT 0,        -- grows with every change of owner
            ADD COLUMN error_message TEXT,
            ADD COLUMN created_at TIMESTAMPTZ,              -- its default comes after: old rows have no such time
            ADD COLUMN finished_at TIMESTAMPTZ;
        ALTER TABLE pgflow.runs
            ALTER COLUMN created_at SET DEFAULT clock_timestamp(),
            SET (fillfactor = 70);                          -- every completion updates the run's row, in place
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.step_states'::regclass AND attname = 'attempts') THEN
        ALTER TABLE pgflow.step_states
            ADD COLUMN attempts INT NOT NULL DEFAULT 0,     -- every execution counts
            ADD COLUMN error_message TEXT,
            ADD COLUMN created_at TIMESTAMPTZ,
            ADD COLUMN started_at TIMESTAMPTZ,              -- of the latest attempt; NULL: not claimed
            ADD COLUMN finished_at TIMESTAMPTZ;
        ALTER TABLE pgflow.step_states
            ALTER COLUMN created_at SET DEFAULT clock_timestamp(),
            SET (fillfactor = 70);
    END IF;

    -- An enumeration, because it costs a write nothing: a CHECK on step_states cost a quarter of each step.
    IF to_regtype('pgflow.ending') IS NULL THEN
        CREATE TYPE pgflow.ending AS ENUM ('cancelled');
        COMMENT ON TYPE pgflow.ending IS 'How a run or a step ended, where its status does not say it.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'ended_as') THEN
        ALTER TABLE pgflow.runs ADD COLUMN ended_as pgflow.ending; -- counts where status is failed; NULL: as status says
        ALTER TABLE pgflow.step_states ADD COLUMN ended_as pgflow.ending;
        -- A role that was granted single columns writes this one together with the reason.
        FOR granted IN
            SELECT a.attrelid::regclass AS name, r.privilege_type AS "right", r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
            FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) r
            WHERE a.attrelid IN ('pgflow.runs'::regclass, 'pgflow.step_states'::regclass) AND a.attname = 'error_message'
        LOOP
            EXECUTE format('GRANT %s (ended_as) ON %s TO %s%s', granted."right", granted.name, granted.grantee,
                           CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'taken_in') THEN
        ALTER TABLE pgflow.runs ADD COLUMN taken_in INT; -- the epoch in which a service has taken it; another one: free
        -- A role that was granted single columns writes this one together with the epoch.
        FOR granted IN
            SELECT r.privilege_type AS "right", r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
            FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) r
            WHERE a.attrelid = 'pgflow.runs'::regclass AND a.attname = 'epoch'
        LOOP
            EXECUTE format('GRANT %s (taken_in) ON pgflow.runs TO %s%s', granted."right", granted.grantee,
                           CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.steps'::regclass AND attname = 'rule') THEN
        ALTER TABLE pgflow.workflows
            ADD COLUMN when_failed TEXT                     -- stop: a failure ends the run at once; continue: what does
                CHECK (when_failed IN ('stop', 'continue')), -- not depend on it goes on; NULL: as its steps need it
            ADD COLUMN failed_by TEXT NOT NULL DEFAULT 'steps' -- whose failure fails the run: that of any step, or that of
                CHECK (failed_by IN ('steps', 'leaves'));   -- a step that none waits for
        ALTER TABLE pgflow.steps
            ADD COLUMN rule TEXT                            -- when it runs; NULL: as decide_step says
                CHECK (rule IN ('all_success', 'all_failed', 'all_done', 'all_done_min_one_success',
                                'all_done_setup_success', 'all_skipped', 'always', 'none_failed',
                                'none_failed_min_one_success', 'none_skipped', 'one_done', 'one_failed',
                                'one_success')),
            ADD COLUMN required_input_pattern JSONB,        -- its input has to contain this
            ADD COLUMN forbidden_input_pattern JSONB,       -- its input must not contain this
            ADD COLUMN when_unmet TEXT NOT NULL DEFAULT 'skip' -- what becomes of it where its input is not so
                CHECK (when_unmet IN ('fail', 'skip', 'skip-cascade')),
            ADD COLUMN when_exhausted TEXT NOT NULL DEFAULT 'fail' -- what becomes of it where its last attempt fails
                CHECK (when_exhausted IN ('fail', 'skip', 'skip-cascade')),
            ADD COLUMN fails_run BOOLEAN NOT NULL DEFAULT true, -- false: its failure never fails the run
            ADD COLUMN is_setup BOOLEAN NOT NULL DEFAULT false; -- for the rule all_done_setup_success
        ALTER TABLE pgflow.definitions
            ADD COLUMN uses_rules BOOLEAN NOT NULL DEFAULT false, -- its steps are decided by `settle`
            ADD COLUMN continues BOOLEAN NOT NULL DEFAULT false; -- its runs go on after a failure
        ALTER TABLE pgflow.definition_steps
            ADD COLUMN rule TEXT,
            ADD COLUMN required_input_pattern JSONB,
            ADD COLUMN forbidden_input_pattern JSONB,
            ADD COLUMN when_unmet TEXT NOT NULL DEFAULT 'skip',
            ADD COLUMN when_exhausted TEXT NOT NULL DEFAULT 'fail',
            ADD COLUMN decides BOOLEAN NOT NULL DEFAULT true, -- its failure fails the run
            ADD COLUMN setups INT NOT NULL DEFAULT 0;       -- how many of its upstream steps are setups
        ALTER TABLE pgflow.definition_deps
            ADD COLUMN from_is_setup BOOLEAN NOT NULL DEFAULT false;
        ALTER TABLE pgflow.waiting_steps                    -- NULL in runs that use no rules
            ADD COLUMN upstream INT,                        -- how many upstream steps it has, and how they ended
            ADD COLUMN skipped INT,
            ADD COLUMN cascaded INT,                        -- skipped with what is below them
            ADD COLUMN failed INT,
            ADD COLUMN not_run INT,
            ADD COLUMN setups_ok INT,
            ADD COLUMN setups_skipped INT,
            ADD COLUMN decided BOOLEAN;                     -- its rule did not wait for the others
        ALTER TABLE pgflow.runs
            ADD COLUMN uses_rules BOOLEAN NOT NULL DEFAULT false,
            ADD COLUMN continues BOOLEAN NOT NULL DEFAULT false;
        ALTER TABLE pgflow.step_states                      -- no CHECK: it would cost a quarter of each step
            ADD COLUMN skip_reason TEXT,                    -- why it was skipped, or is failed without an attempt
            ADD COLUMN skip_cascades BOOLEAN,               -- what is below it is skipped, unless its rule says otherwise
            ADD COLUMN skipped_by TEXT,                     -- the step that did not take it as a branch
            ADD COLUMN skip_note TEXT;                      -- for people
        -- A role that was granted single columns, or what is counted, needs what is new beside it.
        FOR granted IN
            SELECT DISTINCT format('%s (%s) ON %s', r.privilege_type, beside.new_columns, a.attrelid::regclass) AS "right",
                   r.is_grantable, CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
            FROM (VALUES ('pgflow.runs'::regclass, 'remaining', 'uses_rules, continues'),
                         ('pgflow.step_states', 'error_message', 'skip_reason, skip_cascades, skipped_by, skip_note'),
                         ('pgflow.step_states', 'step_slug', 'status, skip_reason, skip_cascades, skipped_by, skip_note, '
                                                             'error_message, finished_at, attempts'))
                 AS beside (relation, known_column, new_columns)
            JOIN pg_catalog.pg_attribute a ON a.attrelid = beside.relation AND a.attname = beside.known_column
            CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) r
            WHERE r.privilege_type = 'INSERT' OR (r.privilege_type <> 'INSERT' AND beside.known_column <> 'step_slug')
            UNION
            SELECT DISTINCT format('%s ON pgflow.undone_steps', r.privilege_type), r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END
            FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) r
            WHERE c.oid = 'pgflow.waiting_steps'::regclass AND r.grantee <> c.relowner
              AND r.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
        LOOP
            EXECUTE format('GRANT %s TO %s%s', granted."right", granted.grantee,
                           CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'logical_date') THEN
        ALTER TABLE pgflow.runs
            ADD COLUMN logical_date TIMESTAMPTZ,            -- which time it is about; NULL: none in particular
            ADD COLUMN data_interval TSTZRANGE,             -- the time whose data it is about: up to the logical date
            ADD COLUMN backfill_id BIGINT;                  -- what started or reopened it last; a backfill may be deleted
        -- As above: single columns, and what is beside the counters.
        FOR granted IN
            SELECT DISTINCT format('%s (%s) ON pgflow.runs', r.privilege_type,
                                   CASE r.privilege_type WHEN 'UPDATE' THEN 'backfill_id'
                                                         ELSE 'logical_date, data_interval, backfill_id' END) AS "right",
                   r.is_grantable, CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
            FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) r
            WHERE a.attrelid = 'pgflow.runs'::regclass AND a.attname = 'remaining'
            UNION
            SELECT DISTINCT format('%s ON pgflow.backfills, pgflow.backfill_dates', r.privilege_type), r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END
            FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) r
            WHERE c.oid = 'pgflow.waiting_steps'::regclass AND r.grantee <> c.relowner
              AND r.privilege_type IN ('SELECT', 'INSERT', 'UPDATE')
        LOOP
            EXECUTE format('GRANT %s TO %s%s', granted."right", granted.grantee,
                           CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.steps'::regclass AND attname = 'step_type') THEN
        ALTER TABLE pgflow.steps
            ADD COLUMN step_type TEXT NOT NULL DEFAULT 'single' -- map: it is executed once for each item of an array
                CHECK (step_type IN ('single', 'map')),
            ADD COLUMN map_over TEXT,                       -- an upstream step, or `payload`; NULL: the only upstream step,
                                                            -- or the payload where the map waits for none
            ADD COLUMN map_path TEXT[],                     -- where the array is in that; NULL: it is the array
            ADD COLUMN max_items INT CHECK (max_items > 0), -- more fail the map; NULL: a million
            ADD COLUMN when_empty TEXT NOT NULL DEFAULT 'complete' -- what becomes of a map without items
                CHECK (when_empty IN ('complete', 'skip', 'skip-cascade')),
            ADD COLUMN when_item_fails TEXT NOT NULL DEFAULT 'stop' -- stop: the map fails at once; continue: it fails after
                CHECK (when_item_fails IN ('stop', 'continue', 'skip')); -- the others; skip: the item is left out
        ALTER TABLE pgflow.definition_steps
            ADD COLUMN step_type TEXT NOT NULL DEFAULT 'single',
            ADD COLUMN map_over TEXT,                       -- a step; NULL: the payload
            ADD COLUMN map_path TEXT[],
            ADD COLUMN max_items INT,
            ADD COLUMN when_empty TEXT NOT NULL DEFAULT 'complete',
            ADD COLUMN when_item_fails TEXT NOT NULL DEFAULT 'stop';
        -- A role that moves runs needs the new tables, too, and writes the result of a map without items.
        FOR granted IN
            SELECT DISTINCT format('%s ON %s', r.privilege_type, made.name) AS "right", r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
            FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) r
            CROSS JOIN (VALUES ('pgflow.step_maps'), ('pgflow.step_items')) AS made (name)
            WHERE c.oid = 'pgflow.waiting_steps'::regclass AND r.grantee <> c.relowner
              AND r.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
            UNION
            SELECT DISTINCT 'INSERT (step_result) ON pgflow.step_states', r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END
            FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) r
            WHERE a.attrelid = 'pgflow.step_states'::regclass AND a.attname = 'step_slug' AND r.privilege_type = 'INSERT'
        LOOP
            EXECUTE format('GRANT %s TO %s%s', granted."right", granted.grantee,
                           CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END IF;

    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow.runs'::regclass AND attname = 'parent_run_id') THEN
        ALTER TABLE pgflow.steps
            ADD COLUMN child_workflow TEXT REFERENCES pgflow.workflows (slug), -- the step is a run of this workflow
            ADD COLUMN child_payload TEXT[],                -- where its payload is in the step's input; NULL: all of that
            ADD COLUMN child_retries INT NOT NULL DEFAULT 0 -- how many further runs are begun after one that failed
                CHECK (child_retries BETWEEN 0 AND 1000),
            ADD COLUMN max_children INT                     -- of a map, how many runs are under way at once; NULL: 100
                CHECK (max_children BETWEEN 1 AND 10000);
        ALTER TABLE pgflow.definition_steps
            ADD COLUMN child_workflow TEXT,
            ADD COLUMN child_payload TEXT[],
            ADD COLUMN child_retries INT NOT NULL DEFAULT 0,
            ADD COLUMN max_children INT;
        ALTER TABLE pgflow.step_maps ADD COLUMN max_children INT; -- NULL: its items are no runs
        ALTER TABLE pgflow.runs
            ADD COLUMN parent_run_id UUID,                  -- the run whose step this run is; that may be deleted before
            ADD COLUMN parent_step_slug TEXT,
            ADD COLUMN parent_item INT,                     -- of a map, which item; NULL: the step is no map
            ADD COLUMN parent_attempt INT;                  -- which attempt of the step or the item
        FOR granted IN
            SELECT DISTINCT format('%s (parent_run_id, parent_step_slug, parent_item, parent_attempt) ON pgflow.runs',
                                   r.privilege_type) AS "right",
                   r.is_grantable, CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END AS grantee
            FROM pg_catalog.pg_attribute a CROSS JOIN LATERAL pg_catalog.aclexplode(a.attacl) r
            WHERE a.attrelid = 'pgflow.runs'::regclass AND a.attname = 'remaining' AND r.privilege_type <> 'UPDATE'
            UNION
            SELECT DISTINCT format('%s ON pgflow.child_requests', r.privilege_type), r.is_grantable,
                   CASE r.grantee WHEN 0 THEN 'PUBLIC' ELSE r.grantee::regrole::text END
            FROM pg_catalog.pg_class c CROSS JOIN LATERAL pg_catalog.aclexplode(c.relacl) r
            WHERE c.oid = 'pgflow.waiting_steps'::regclass AND r.grantee <> c.relowner
              AND r.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
        LOOP
            EXECUTE format('GRANT %s TO %s%s', granted."right", granted.grantee,
                           CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
        END LOOP;
    END IF;

    IF to_regclass('pgflow.step_items_due') IS NULL THEN
        CREATE INDEX step_items_due ON pgflow.step_items (run_id, step_slug, due_at) WHERE due_at IS NOT NULL;
    END IF;
    IF to_regclass('pgflow.deps_upstream') IS NULL THEN
        CREATE INDEX deps_upstream ON pgflow.deps (workflow_slug, to_step_slug, from_step_slug);
    END IF;
    -- The free runs of a workflow stand together, the oldest first, and so do those that were taken. `init` builds this
    -- index after the script, without a lock, where the table has the former one.
    IF to_regclass('pgflow.runs_pending') IS NULL
       OR coalesce(current_setting('pgflow.keys_follow', true), '') <> 'on' THEN
        IF EXISTS (SELECT FROM pg_catalog.pg_index
                   WHERE indexrelid = to_regclass('pgflow.runs_to_take') AND NOT indisvalid) THEN
            DROP INDEX pgflow.runs_to_take; -- what an interrupted build has left
        END IF;
        IF to_regclass('pgflow.runs_to_take') IS NULL THEN
            CREATE INDEX runs_to_take ON pgflow.runs (workflow_slug, (taken_in IS DISTINCT FROM epoch), created_at)
                WHERE status = 'pending';
        END IF;
        IF to_regclass('pgflow.runs_pending') IS NOT NULL THEN
            DROP INDEX pgflow.runs_pending;
        END IF;
    END IF;
    -- Of a date, the runs: `init` builds this one after the script, too, where the table was there before.
    IF coalesce(current_setting('pgflow.keys_follow', true), '') <> 'on'
       OR ('pg_class'::regclass::oid || '/' || 'pgflow.runs'::regclass::oid)
          <> ALL (string_to_array(current_setting('pgflow.known_objects'), ' ')) THEN
        IF EXISTS (SELECT FROM pg_catalog.pg_index
                   WHERE indexrelid = to_regclass('pgflow.runs_dated') AND NOT indisvalid) THEN
            DROP INDEX pgflow.runs_dated; -- what an interrupted build has left
        END IF;
        IF to_regclass('pgflow.runs_dated') IS NULL THEN
            CREATE INDEX runs_dated ON pgflow.runs (workflow_slug, logical_date) WHERE logical_date IS NOT NULL;
        END IF;
        IF EXISTS (SELECT FROM pg_catalog.pg_index
                   WHERE indexrelid = to_regclass('pgflow.runs_of_parent') AND NOT indisvalid) THEN
            DROP INDEX pgflow.runs_of_parent;
        END IF;
        IF to_regclass('pgflow.runs_of_parent') IS NULL THEN
            CREATE UNIQUE INDEX runs_of_parent
                ON pgflow.runs (parent_run_id, parent_step_slug, (coalesce(parent_item, -1)), parent_attempt)
                WHERE parent_run_id IS NOT NULL; -- no attempt ever has two runs
        END IF;
    END IF;
    IF to_regclass('pgflow.backfills_open') IS NULL THEN
        CREATE INDEX backfills_open ON pgflow.backfills (id) WHERE finished_at IS NULL;
        CREATE INDEX backfill_dates_planned ON pgflow.backfill_dates (backfill_id, logical_date) WHERE state = 'planned';
        CREATE INDEX backfill_dates_started ON pgflow.backfill_dates (backfill_id, logical_date) WHERE state = 'started';
        CREATE INDEX backfill_dates_by_run ON pgflow.backfill_dates (run_id) WHERE run_id IS NOT NULL;
    END IF;
    IF to_regclass('pgflow.runs_ended') IS NULL THEN
        -- For the deletion of old runs: the oldest of a workflow, without a look at the others.
        CREATE INDEX runs_ended ON pgflow.runs (workflow_slug, status, finished_at) WHERE status <> 'pending';
    END IF;
    IF to_regclass('pgflow.definitions_by_version') IS NULL THEN
        -- Not unique: of two first runs at once, the later one would wait for the transaction of the earlier one.
        ALTER TABLE pgflow.definitions DROP CONSTRAINT IF EXISTS definitions_workflow_slug_version_key;
        CREATE INDEX definitions_by_version ON pgflow.definitions (workflow_slug, version, id);
    END IF;
    IF to_regclass('pgflow.definition_steps_roots') IS NULL THEN
        CREATE INDEX definition_steps_roots ON pgflow.definition_steps (definition_id) WHERE in_degree = 0;
    END IF;
    IF to_regclass('pgflow.definition_deps_upstream') IS NULL THEN
        CREATE INDEX definition_deps_upstream
            ON pgflow.definition_deps (definition_id, to_step_slug, from_step_slug);
    END IF;
END
$columns$;

-- Version 2 marked a cancelled run by its message only. A run was cancelled if it has the same reason as its steps:
-- cancel_run gave them one reason, while the error of a failed step begins with the step. A database that had version 3
-- before may have notes that are out of date.
DO $cancelled$
DECLARE
    seen uuid[];
    since timestamptz;
    noted uuid[];
    outlived uuid[];
    restore text;
BEGIN
    IF to_regclass('pgflow.ended_before') IS NOT NULL THEN -- `init` has looked, before any table was locked
        EXECUTE 'SELECT array_agg(run_id), min(looked_at) - interval ''1 hour'' FROM pgflow.ended_before' INTO seen, since;
        DROP TABLE pgflow.ended_before;
    END IF;
    IF current_setting('pgflow.former_version')::int NOT BETWEEN 1 AND 2 THEN
        RETURN;
    END IF;
    -- What `init` has seen, and what failed since then; or all, by the index of ended runs: most runs have completed.
    SELECT array_agg(found.id) FILTER (WHERE found.is_cancelled), array_agg(found.id) FILTER (WHERE found.is_outlived)
    INTO noted, outlived
    FROM (
        SELECT r.id, r.ended_as IS NOT NULL AND r.error_message LIKE ANY (failures.messages) AS is_outlived,
               r.ended_as IS NULL AND r.error_message NOT LIKE ALL (failures.messages)
               AND (r.error_message LIKE 'cancelled%'
                    OR EXISTS (SELECT FROM pgflow.step_states s
                               WHERE s.run_id = r.id AND s.status = 'failed' AND s.error_message = r.error_message
                               OFFSET 0)) AS is_cancelled
        -- 'given up': the adapter had given up, for its owners had vanished.
        FROM (SELECT ARRAY['step "%" failed: %', 'given up: %', 'the run can''t begin: %'] AS messages) failures,
             (SELECT r.id FROM pgflow.workflows w CROSS JOIN LATERAL (
                  SELECT r.id FROM pgflow.runs r
                  WHERE r.workflow_slug = w.slug AND r.status = 'failed' AND (since IS NULL OR r.finished_at >= since)
                  OFFSET 0) r
              UNION SELECT unnest(seen)) looked_at
        JOIN pgflow.runs r ON r.id = looked_at.id
        WHERE r.status = 'failed') found;
    IF noted IS NULL AND outlived IS NULL THEN
        RETURN;
    END IF;
    restore := pgflow.pause_reactions('pgflow.runs', 'pgflow.step_states');
    UPDATE pgflow.runs r SET ended_as = 'cancelled' FROM unnest(noted) AS n (id) WHERE r.id = n.id;
    UPDATE pgflow.step_states s SET ended_as = 'cancelled'
    FROM unnest(noted) AS n (id) JOIN pgflow.runs r ON r.id = n.id
    WHERE s.run_id = r.id AND s.status = 'failed' AND s.error_message = r.error_message;
    UPDATE pgflow.runs r SET ended_as = NULL FROM unnest(outlived) AS o (id) WHERE r.id = o.id;
    UPDATE pgflow.step_states s SET ended_as = NULL FROM unnest(outlived) AS o (id)
    WHERE s.run_id = o.id AND s.ended_as IS NOT NULL;
    EXECUTE restore;
EXCEPTION
    WHEN lock_not_available OR deadlock_detected THEN
        RAISE;
    WHEN OTHERS THEN -- a constraint of a user's: those runs still show as failed
        RAISE WARNING 'which runs were cancelled before this upgrade can''t be noted: %', SQLERRM;
END
$cancelled$;

DO $pages$
BEGIN
    PERFORM pgflow.reserve_pages('pgflow', ARRAY['workflows', 'steps', 'deps', 'runs', 'step_states', 'definitions',
                                                 'definition_steps', 'definition_deps', 'waiting_steps', 'undone_steps',
                                                 'step_maps', 'step_items', 'backfills', 'backfill_dates',
                                                 'child_requests']);
END
$pages$;

CREATE OR REPLACE FUNCTION pgflow.engine_version() RETURNS int
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pgflow, pg_temp
AS $$
DECLARE
    version CONSTANT int := 6; -- programs read the first number of this text
    script CONSTANT text := coalesce(nullif(current_setting('pgflow.script_version', true), ''), '2');
BEGIN
    -- A script asks after it has looked at the schema and before it replaces anything. Those of version 2 replace what
    -- is newer than they are, unless this stops them.
    IF coalesce(current_setting('pgflow.known_objects', true), '') <> '' AND script::int < version THEN
        RAISE EXCEPTION 'the schema pgflow has version %, and this script is of an older version', version
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
    RETURN version;
END
$$;

COMMENT ON FUNCTION pgflow.engine_version() IS
    'Version of this script: a higher one upgrades a lower one, and a lower one is refused.';


------------------------------------------------------------------------------------------------------------
-- Cycles
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.find_cycle(workflow_slug text) RETURNS text[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off -- on tables never analyzed a nested loop looks cheap, and is quadratic
SET jit = off -- where a nested loop is all there is, it looks so expensive that it would be compiled at every call
AS $$
#variable_conflict use_column
DECLARE
    slugs text[];        -- the steps, numbered by their place
    targets int[];       -- the deps' downstream steps, those of one step side by side ...
    ends int[];          -- ... up to and with this place
    unmet int[];         -- upstream steps not yet taken out
    upstream int[];      -- for the path: one upstream step on a cycle or before one
    ready int[] := '{}'; -- what has no upstream left
    head int := 0;
    tail int := 0;
    first int;
    step int;
    seen boolean[];
    path text[] := '{}';
    lowest int;
BEGIN
    WITH node AS MATERIALIZED (
        SELECT s.slug, row_number() OVER (ORDER BY s.slug)::int AS i
        FROM pgflow.steps s WHERE s.workflow_slug = find_cycle.workflow_slug
    ), edge AS MATERIALIZED (
        SELECT f.i AS from_i, t.i AS to_i
        FROM pgflow.deps d
        JOIN node f ON f.slug = d.from_step_slug
        JOIN node t ON t.slug = d.to_step_slug
        WHERE d.workflow_slug = find_cycle.workflow_slug
    ), out_degree AS (
        SELECT from_i AS i, count(*) AS n FROM edge GROUP BY from_i
    ), in_degree AS (
        SELECT to_i AS i, count(*) AS n FROM edge GROUP BY to_i
    )
    SELECT array_agg(place.slug ORDER BY place.i), array_agg(place.last ORDER BY place.i),
           array_agg(place.unmet ORDER BY place.i),
           (SELECT array_agg(edge.to_i ORDER BY edge.from_i) FROM edge)
    INTO slugs, ends, unmet, targets
    FROM (
        SELECT node.i, node.slug, coalesce(in_degree.n, 0)::int AS unmet,
               (sum(coalesce(out_degree.n, 0)) OVER (ORDER BY node.i))::int AS last
        FROM node LEFT JOIN out_degree USING (i) LEFT JOIN in_degree USING (i)
    ) place;

    IF targets IS NULL THEN
        RETURN NULL;
    END IF;

    -- Kahn (1962): take out what has no upstream step left; a cycle is what can't be taken out.
    FOR i IN 1 .. cardinality(slugs) LOOP
        IF unmet[i] = 0 THEN
            tail := tail + 1;
            ready[tail] := i;
        END IF;
    END LOOP;
    WHILE head < tail LOOP
        head := head + 1;
        step := ready[head];
        first := CASE step WHEN 1 THEN 1 ELSE ends[step - 1] + 1 END;
        FOR i IN first .. ends[step] LOOP
            unmet[targets[i]] := unmet[targets[i]] - 1;
            IF unmet[targets[i]] = 0 THEN
                tail := tail + 1;
                ready[tail] := targets[i];
            END IF;
        END LOOP;
    END LOOP;
    IF tail = cardinality(slugs) THEN
        RETURN NULL;
    END IF;

    -- Whatever is left has an upstream step that is left too: walking up must come back to where it was.
    upstream := array_fill(0, ARRAY[cardinality(slugs)]);
    seen := array_fill(false, ARRAY[cardinality(slugs)]);
    FOR i IN REVERSE cardinality(slugs) .. 1 LOOP
        IF unmet[i] > 0 THEN
            step := i;
            first := CASE i WHEN 1 THEN 1 ELSE ends[i - 1] + 1 END;
            FOR j IN first .. ends[i] LOOP
                upstream[targets[j]] := i;
            END LOOP;
        END IF;
    END LOOP;
    WHILE NOT seen[step] LOOP
        seen[step] := true;
        step := upstream[step];
    END LOOP;
    lowest := step;
    first := step;
    LOOP
        first := upstream[first];
        EXIT WHEN first = step;
        lowest := least(lowest, first);
    END LOOP;
    -- From the first in the alphabet, so that one cycle always reads the same; found upwards, told downwards.
    step := lowest;
    LOOP
        path := slugs[step] || path;
        step := upstream[step];
        EXIT WHEN step = lowest;
    END LOOP;
    RETURN slugs[lowest] || path;
END
$$;

COMMENT ON FUNCTION pgflow.find_cycle(text) IS
    'A cycle in the workflow''s dependencies as {a,b,a}, or NULL. One pass over its steps and deps.';


CREATE OR REPLACE FUNCTION pgflow.closes_cycle(workflow_slug text, from_step_slug text, to_step_slug text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
    -- Two searches that meet a cycle alike; taking turns, they cost twice the smaller one. Loading a chain
    -- from either end, one of them is over at once. OFFSET 0 makes each step an index lookup of its own: a
    -- plan made while the table was empty may as well read all deps of the workflow, once a call.
    downwards CURSOR FOR
        WITH RECURSIVE reached(slug) AS (
            SELECT closes_cycle.to_step_slug
            UNION
            SELECT d.to_step_slug FROM reached r CROSS JOIN LATERAL (
                SELECT d.to_step_slug FROM pgflow.deps d
                WHERE d.workflow_slug = closes_cycle.workflow_slug AND d.from_step_slug = r.slug OFFSET 0) d
        ) SELECT slug FROM reached;
    upwards CURSOR FOR
        WITH RECURSIVE reached(slug) AS (
            SELECT closes_cycle.from_step_slug
            UNION
            SELECT d.from_step_slug FROM reached r CROSS JOIN LATERAL (
                SELECT d.from_step_slug FROM pgflow.deps d
                WHERE d.workflow_slug = closes_cycle.workflow_slug AND d.to_step_slug = r.slug OFFSET 0) d
        ) SELECT slug FROM reached;
    below text;
    above text;
    closes boolean := false;
BEGIN
    OPEN downwards;
    OPEN upwards;
    LOOP
        FETCH downwards INTO below;
        EXIT WHEN NOT FOUND;
        FETCH upwards INTO above;
        EXIT WHEN NOT FOUND;
        closes := below = closes_cycle.from_step_slug OR above = closes_cycle.to_step_slug;
        EXIT WHEN closes;
    END LOOP;
    CLOSE downwards;
    CLOSE upwards;
    RETURN closes;
END
$$;

COMMENT ON FUNCTION pgflow.closes_cycle(text, text, text) IS
    'Whether this one dep is part of a cycle. Costs twice the smaller of what is above it and below it.';


-- The name of this argument stops the script of version 1, which asks for no version: PostgreSQL can't replace a function
-- if an argument's name differs. So this drops the former function, and gives its rights and its owner to the new one.
DO $renamed$
DECLARE
    former pg_catalog.pg_proc;
    created oid;
    granted record;
BEGIN
    SELECT * INTO former FROM pg_catalog.pg_proc
    WHERE oid = to_regprocedure('pgflow.refuse_cycle(text)') AND proargnames[1] = 'workflow_slug';
    IF NOT FOUND THEN
        RETURN;
    END IF;
    DROP FUNCTION pgflow.refuse_cycle(text);
    CREATE FUNCTION pgflow.refuse_cycle(of_workflow text) RETURNS void LANGUAGE sql AS '';
    created := 'pgflow.refuse_cycle(text)'::regprocedure;
    FOR granted IN
        SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee
        FROM pg_catalog.pg_proc p
        CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        WHERE p.oid = created AND a.grantee <> p.proowner
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION pgflow.refuse_cycle(text) FROM %s', granted.grantee);
    END LOOP;
    FOR granted IN
        SELECT a.is_grantable, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee
        FROM aclexplode(coalesce(former.proacl, acldefault('f', former.proowner))) a
        WHERE a.grantee <> former.proowner
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION pgflow.refuse_cycle(text) TO %s%s', granted.grantee,
                       CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
    EXECUTE format('ALTER FUNCTION pgflow.refuse_cycle(text) OWNER TO %s', former.proowner::regrole);
    -- To close_schema it is the function that was there before.
    PERFORM set_config('pgflow.known_objects', concat_ws(' ', current_setting('pgflow.known_objects'),
                                                         'pg_proc'::regclass::oid || '/' || created), true);
END
$renamed$;

CREATE OR REPLACE FUNCTION pgflow.refuse_cycle(of_workflow text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    path text[] := pgflow.find_cycle(of_workflow);
BEGIN
    IF path IS NOT NULL THEN
        RAISE EXCEPTION 'workflow "%" has a cycle: %', of_workflow, array_to_string(path, ' -> ')
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Steps of a cycle would wait for each other for ever: leave one of these deps out.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.refuse_cycle(text) IS 'Raises 22023 with the path where the workflow has a cycle.';


------------------------------------------------------------------------------------------------------------
-- Edits: every one raises the workflow's version
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.raise_version(workflow_slugs text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    edited text;
BEGIN
    -- The row lock of this UPDATE, held to the end of the transaction, puts the edits of a workflow in a line. Once
    -- a transaction and version: loading ten thousand rows one by one must not leave ten thousand dead versions of
    -- this row for the next statement to walk through.
    FOR edited IN SELECT DISTINCT slug FROM unnest(workflow_slugs) AS slug ORDER BY slug LOOP
        UPDATE pgflow.workflows w
        SET version = w.version + 1, edited_in = pg_current_xact_id()
        WHERE w.slug = edited
          AND (w.edited_in IS DISTINCT FROM pg_current_xact_id()
               OR EXISTS (SELECT FROM pgflow.definitions d
                          WHERE d.workflow_slug = w.slug AND d.version = w.version));
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.raise_version(text[]) IS
    'Makes the next run of each workflow take a new snapshot. Called by the triggers on steps and deps.';


CREATE OR REPLACE FUNCTION pgflow.steps_edited() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    edited text[];
    removed text[];     -- the slugs of removed steps ...
    removed_from text[]; -- ... and of their workflows
    waiting record;
BEGIN
    IF TG_RELID <> 'pgflow.steps'::regclass THEN -- with the owner's rights, on another role's table
        RAISE EXCEPTION 'the trigger function pgflow.steps_edited is for pgflow.steps, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF TG_OP = 'INSERT' THEN
        SELECT array_agg(DISTINCT workflow_slug) INTO edited FROM new_rows;
    ELSIF TG_OP = 'DELETE' THEN
        SELECT array_agg(DISTINCT workflow_slug) INTO edited FROM old_rows;
        SELECT array_agg(o.slug), array_agg(o.workflow_slug) INTO removed, removed_from FROM old_rows o;
    ELSIF TG_OP = 'TRUNCATE' THEN -- tells no rows: whatever was ever run is gone
        SELECT array_agg(w.slug) INTO edited FROM pgflow.workflows w;
        SELECT array_agg(s.slug), array_agg(s.workflow_slug) INTO removed, removed_from
        FROM (SELECT DISTINCT f.workflow_slug, d.slug
              FROM pgflow.definitions f JOIN pgflow.definition_steps d ON d.definition_id = f.id) s;
    ELSE
        SELECT array_agg(DISTINCT workflow_slug) INTO edited
        FROM (SELECT workflow_slug FROM old_rows UNION ALL SELECT workflow_slug FROM new_rows) changed;
        SELECT array_agg(o.slug), array_agg(o.workflow_slug) INTO removed, removed_from FROM old_rows o
        WHERE NOT EXISTS (SELECT FROM new_rows n WHERE n.workflow_slug = o.workflow_slug AND n.slug = o.slug);
    END IF;
    IF edited IS NULL THEN
        RETURN NULL;
    END IF;

    -- As a replica, a session loads what was checked elsewhere: only the next run has to see it.
    IF removed IS NOT NULL AND current_setting('session_replication_role') <> 'replica' THEN
        -- Waits for transactions that are creating a run of the old definition: the look below must see it.
        PERFORM FROM pgflow.workflows w WHERE w.slug = ANY (edited) ORDER BY w.slug FOR UPDATE;

        SELECT r.id, gone.workflow_slug, gone.slug INTO waiting
        FROM unnest(removed, removed_from) AS gone (slug, workflow_slug)
        JOIN pgflow.runs r ON r.workflow_slug = gone.workflow_slug AND r.status = 'pending'
        JOIN pgflow.definition_steps d ON d.definition_id = r.definition_id AND d.slug = gone.slug
        WHERE NOT EXISTS (SELECT FROM pgflow.step_states s WHERE s.run_id = r.id AND s.step_slug = gone.slug)
        LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'step "%" of workflow "%" can''t be deleted: run % is pending and has yet to start it',
                            waiting.slug, waiting.workflow_slug, waiting.id
                USING ERRCODE = 'object_not_in_prerequisite_state',
                      HINT = 'Let the run finish, or end it: SELECT pgflow.cancel_run(run_id, reason)';
        END IF;
    END IF;

    PERFORM pgflow.raise_version(edited);
    IF TG_OP IN ('INSERT', 'UPDATE') AND current_setting('session_replication_role') <> 'replica' THEN
        PERFORM pgflow.refuse_children(n.workflow_slug)
        FROM (SELECT DISTINCT n.workflow_slug FROM new_rows n WHERE n.child_workflow IS NOT NULL) n;
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow.steps_edited() IS
    'Raises the version of edited workflows; refuses to delete a step that a pending run has yet to start.';


CREATE OR REPLACE FUNCTION pgflow.deps_edited() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    edited text[];
    grown text[];
    added bigint := 0;
    dep record;
    workflow text;
BEGIN
    IF TG_RELID <> 'pgflow.deps'::regclass THEN -- with the owner's rights, on another role's table
        RAISE EXCEPTION 'the trigger function pgflow.deps_edited is for pgflow.deps, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF TG_OP = 'DELETE' THEN
        SELECT array_agg(DISTINCT workflow_slug) INTO edited FROM old_rows;
    ELSIF TG_OP = 'TRUNCATE' THEN
        SELECT array_agg(w.slug) INTO edited FROM pgflow.workflows w;
    ELSE
        SELECT array_agg(DISTINCT workflow_slug), count(*) INTO grown, added FROM new_rows;
        edited := grown;
        IF TG_OP = 'UPDATE' THEN
            SELECT array_agg(DISTINCT workflow_slug) || grown INTO edited FROM old_rows;
        END IF;
    END IF;
    IF edited IS NULL THEN
        RETURN NULL;
    END IF;

    -- First the lock, then the look: of two transactions that close a cycle together, the later one sees it.
    PERFORM pgflow.raise_version(edited);

    IF current_setting('session_replication_role') = 'replica' THEN
        RETURN NULL; -- as in steps_edited
    ELSIF added = 1 THEN
        SELECT * INTO dep FROM new_rows;
        IF pgflow.closes_cycle(dep.workflow_slug, dep.from_step_slug, dep.to_step_slug) THEN
            PERFORM pgflow.refuse_cycle(dep.workflow_slug);
        END IF;
    ELSIF added > 1 THEN
        FOREACH workflow IN ARRAY grown LOOP
            PERFORM pgflow.refuse_cycle(workflow);
        END LOOP;
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow.deps_edited() IS 'Raises the version of edited workflows; refuses a cycle.';


CREATE OR REPLACE FUNCTION pgflow.workflows_edited() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
BEGIN
    IF TG_RELID <> 'pgflow.workflows'::regclass THEN -- as in steps_edited
        RAISE EXCEPTION 'the trigger function pgflow.workflows_edited is for pgflow.workflows, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM pgflow.raise_version(ARRAY[NEW.slug]);
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow.workflows_edited() IS
    'Raises the version of a workflow whose when_failed or failed_by was edited.';


-- A slug becomes a name in Prefect, an HTTP header and a line of a log, so it may have no control characters.
CREATE OR REPLACE FUNCTION pgflow.refuse_slug() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
BEGIN
    IF TG_RELID NOT IN ('pgflow.workflows'::regclass, 'pgflow.steps'::regclass) THEN
        RAISE EXCEPTION 'the trigger function pgflow.refuse_slug is for pgflow''s tables, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RAISE EXCEPTION 'the slug % has a control character', to_json(NEW.slug)
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Choose a slug without line ends, tabs and escape sequences.';
END
$$;

COMMENT ON FUNCTION pgflow.refuse_slug() IS 'Refuses a new slug that has a control character.';

DO $slugs$
DECLARE
    named text;
    -- Beyond ASCII, only in Unicode: another encoding may have a letter there.
    controls text := CASE pg_catalog.getdatabaseencoding()
        WHEN 'UTF8' THEN E'[\\u0001-\\u001f\\u007f-\\u009f]' ELSE E'[\\u0001-\\u001f\\u007f]' END;
BEGIN
    FOREACH named IN ARRAY ARRAY['workflows', 'steps'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_trigger
                              WHERE tgrelid = ('pgflow.' || named)::regclass AND tgname = 'refuse_slug');
        EXECUTE format('CREATE TRIGGER refuse_slug BEFORE INSERT OR UPDATE OF slug ON pgflow.%I '
                       'FOR EACH ROW WHEN (NEW.slug ~ %L) EXECUTE FUNCTION pgflow.refuse_slug()', named, controls);
    END LOOP;
END
$slugs$;


DO $triggers$
DECLARE
    edited text;
    event text;
    transition text;
    state "char";
BEGIN
    FOREACH edited IN ARRAY ARRAY['steps', 'deps'] LOOP
        FOREACH event IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
            SELECT tgenabled INTO state FROM pg_catalog.pg_trigger
            WHERE tgrelid = ('pgflow.' || edited)::regclass AND tgname = 'edited_by_' || event;
            IF FOUND THEN
                IF state = 'O' THEN -- disabled: an administrator's decision
                    EXECUTE format('ALTER TABLE pgflow.%I ENABLE ALWAYS TRIGGER edited_by_%s', edited, event);
                END IF;
                CONTINUE;
            END IF;
            transition := CASE event WHEN 'insert' THEN 'REFERENCING NEW TABLE AS new_rows'
                                     WHEN 'update' THEN 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'
                                     WHEN 'delete' THEN 'REFERENCING OLD TABLE AS old_rows'
                                     ELSE '' END;
            EXECUTE format('CREATE TRIGGER edited_by_%s AFTER %s ON pgflow.%I %s '
                           'FOR EACH STATEMENT EXECUTE FUNCTION pgflow.%I()',
                           event, event, edited, transition, edited || '_edited');
            -- In a session with session_replication_role = replica, too: an edit that no trigger sees would leave an
            -- old snapshot in force.
            EXECUTE format('ALTER TABLE pgflow.%I ENABLE ALWAYS TRIGGER edited_by_%s', edited, event);
        END LOOP;
    END LOOP;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                   WHERE tgrelid = 'pgflow.workflows'::regclass AND tgname = 'edited_by_update') THEN
        -- By its columns: raise_version updates the row itself.
        CREATE TRIGGER edited_by_update AFTER UPDATE OF when_failed, failed_by ON pgflow.workflows FOR EACH ROW
            WHEN (OLD.when_failed IS DISTINCT FROM NEW.when_failed OR OLD.failed_by IS DISTINCT FROM NEW.failed_by)
            EXECUTE FUNCTION pgflow.workflows_edited();
    END IF;
    SELECT tgenabled INTO state FROM pg_catalog.pg_trigger
    WHERE tgrelid = 'pgflow.workflows'::regclass AND tgname = 'edited_by_update';
    IF state = 'O' THEN -- new, or after a restore that disabled all triggers and enabled them again
        ALTER TABLE pgflow.workflows ENABLE ALWAYS TRIGGER edited_by_update;
    END IF;
END
$triggers$;


CREATE OR REPLACE FUNCTION pgflow.refuse_rules(of_workflow text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    step pgflow.steps;
BEGIN
    SELECT s.* INTO step FROM pgflow.workflows w JOIN pgflow.steps s ON s.workflow_slug = w.slug
    WHERE w.slug = of_workflow AND w.when_failed = 'stop' AND (pgflow.may_follow_failure(s.rule) OR NOT s.fails_run)
    ORDER BY s.slug LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'workflow "%" stops at the first failure, and its step "%" %', of_workflow, step.slug,
                        CASE WHEN step.fails_run THEN format('has the rule %s, which may run after one', step.rule)
                             ELSE 'is not to fail its run' END
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Set when_failed of the workflow to NULL or to continue, or take that from the step.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.refuse_rules(text) IS
    'Raises 22023 where a workflow stops at the first failure and one of its steps needs it to go on.';


CREATE OR REPLACE FUNCTION pgflow.refuse_maps(of_workflow text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    map record;
BEGIN
    SELECT s.slug, s.map_over, count(d.from_step_slug) AS upstream INTO map
    FROM pgflow.steps s
    LEFT JOIN pgflow.deps d ON d.workflow_slug = s.workflow_slug AND d.to_step_slug = s.slug
    WHERE s.workflow_slug = of_workflow AND s.step_type = 'map'
    GROUP BY s.slug, s.map_over
    HAVING CASE WHEN s.map_over IS NULL THEN count(d.from_step_slug) > 1
                ELSE s.map_over <> 'payload' AND coalesce(bool_and(d.from_step_slug <> s.map_over), true) END
    ORDER BY s.slug LIMIT 1;
    IF FOUND AND map.map_over IS NULL THEN
        RAISE EXCEPTION 'step "%" of workflow "%" is a map, and waits for % steps', map.slug, of_workflow, map.upstream
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Set map_over of the step to the one whose result it maps over, or to payload.';
    ELSIF FOUND THEN
        RAISE EXCEPTION 'step "%" of workflow "%" maps over "%", which it does not wait for', map.slug, of_workflow,
                        map.map_over
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Set map_over of the step to an upstream step, or to payload; or insert the dep.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.refuse_maps(text) IS
    'Raises 22023 where the rows of a workflow do not say what one of its maps maps over.';


CREATE OR REPLACE FUNCTION pgflow.write_snapshot(workflow_slug text) RETURNS pgflow.definitions
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET jit = off -- as in find_cycle
AS $$
#variable_conflict use_column
DECLARE
    current_version bigint;
    definition pgflow.definitions;
    is_new boolean := false;
    written bigint;
BEGIN
    SELECT w.version INTO current_version FROM pgflow.workflows w WHERE w.slug = write_snapshot.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    SELECT * INTO definition
    FROM pgflow.definitions d WHERE d.workflow_slug = write_snapshot.workflow_slug AND d.version = current_version
    ORDER BY d.id LIMIT 1;
    IF NOT FOUND THEN
        IF NOT EXISTS (SELECT FROM pgflow.steps s WHERE s.workflow_slug = write_snapshot.workflow_slug) THEN
            RAISE EXCEPTION 'workflow "%" has no steps', workflow_slug
                USING ERRCODE = 'invalid_parameter_value', HINT = 'Insert its steps into pgflow.steps first.';
        END IF;
        PERFORM pgflow.refuse_rules(workflow_slug);
        PERFORM pgflow.refuse_maps(workflow_slug);
        PERFORM pgflow.refuse_children(workflow_slug);
        PERFORM pgflow.refuse_cycle(workflow_slug); -- deps older than the triggers, or loaded past them

        -- Of two first runs at once, each writes a snapshot, and neither waits for the other's transaction. They are
        -- alike, and later runs begin with the one that was begun first.
        INSERT INTO pgflow.definitions (workflow_slug, version, step_count, uses_rules, continues)
        SELECT w.slug, w.version, s.step_count, s.uses_rules OR s.continues, s.continues
        FROM pgflow.workflows w
        CROSS JOIN LATERAL (
            SELECT count(*) AS step_count,
                   coalesce(bool_or(s.rule IS NOT NULL OR s.required_input_pattern IS NOT NULL
                                    OR s.forbidden_input_pattern IS NOT NULL OR s.when_exhausted <> 'fail'
                                    OR s.step_type = 'map' OR s.child_workflow IS NOT NULL), false)
                       AS uses_rules,
                   CASE w.when_failed WHEN 'continue' THEN true WHEN 'stop' THEN false
                       ELSE coalesce(bool_or(pgflow.may_follow_failure(s.rule) OR NOT s.fails_run), false) END AS continues
            FROM pgflow.steps s WHERE s.workflow_slug = w.slug) s
        WHERE w.slug = write_snapshot.workflow_slug AND w.version = current_version
        RETURNING * INTO definition;
        is_new := FOUND;
    END IF;

    -- Until the run is there to be seen, no step of this version is deleted. Other edits do not wait for this lock.
    PERFORM FROM pgflow.workflows w WHERE w.slug = write_snapshot.workflow_slug FOR KEY SHARE;
    IF is_new THEN
        -- One statement sees one state of all three tables: the version, and the steps and deps that belong to it.
        WITH unedited AS MATERIALIZED (
            SELECT FROM pgflow.workflows w
            WHERE w.slug = write_snapshot.workflow_slug AND w.version = current_version
        ), dep AS MATERIALIZED (
            SELECT d.from_step_slug, d.to_step_slug, f.is_setup AS from_is_setup, t.fails_run AS to_fails_run
            FROM pgflow.deps d
            JOIN pgflow.steps f ON f.workflow_slug = write_snapshot.workflow_slug AND f.slug = d.from_step_slug
            JOIN pgflow.steps t ON t.workflow_slug = write_snapshot.workflow_slug AND t.slug = d.to_step_slug
            WHERE d.workflow_slug = write_snapshot.workflow_slug
        ), upstream AS MATERIALIZED (
            SELECT d.to_step_slug AS slug, count(*) AS in_degree, count(*) FILTER (WHERE d.from_is_setup) AS setups,
                   min(d.from_step_slug) AS first_slug
            FROM dep d GROUP BY d.to_step_slug
        ), downstream AS MATERIALIZED (
            SELECT d.from_step_slug AS slug, bool_or(d.to_fails_run) AS fail_run FROM dep d GROUP BY d.from_step_slug
        ), copied_deps AS (
            INSERT INTO pgflow.definition_deps (definition_id, from_step_slug, to_step_slug, to_in_degree, from_is_setup)
            SELECT definition.id, d.from_step_slug, d.to_step_slug, u.in_degree, d.from_is_setup
            FROM dep d JOIN upstream u ON u.slug = d.to_step_slug
            WHERE EXISTS (SELECT FROM unedited)
        ), step AS MATERIALIZED ( -- failed_by = leaves: those whose failure counts, and below which that of none does
            SELECT s.*, coalesce(u.in_degree, 0) AS in_degree, coalesce(u.setups, 0) AS setups,
                   s.fails_run AND b.fail_run IS NOT TRUE AS is_last, b.slug IS NULL AS is_leaf,
                   CASE WHEN s.map_over IS NULL THEN u.first_slug ELSE o.from_step_slug END AS source_slug
            FROM pgflow.steps s
            LEFT JOIN upstream u ON u.slug = s.slug
            LEFT JOIN downstream b ON b.slug = s.slug
            LEFT JOIN dep o ON o.to_step_slug = s.slug AND o.from_step_slug = s.map_over
            WHERE s.workflow_slug = write_snapshot.workflow_slug
        )
        INSERT INTO pgflow.definition_steps (definition_id, slug, in_degree, rule, required_input_pattern,
                                             forbidden_input_pattern, when_unmet, when_exhausted, decides, setups,
                                             step_type, map_over, map_path, max_items, when_empty, when_item_fails,
                                             child_workflow, child_payload, child_retries, max_children)
        SELECT definition.id, s.slug, s.in_degree, s.rule, s.required_input_pattern, s.forbidden_input_pattern,
               s.when_unmet, s.when_exhausted,
               -- Sub-selects: once a workflow. As a joined row, the aggregate would be computed again for each step.
               CASE WHEN (SELECT w.failed_by = 'leaves' FROM pgflow.workflows w
                          WHERE w.slug = write_snapshot.workflow_slug)
                    THEN CASE WHEN (SELECT bool_or(i.is_last) FROM step i) THEN s.is_last ELSE s.is_leaf END
                    ELSE s.fails_run END,
               s.setups, s.step_type, CASE s.step_type WHEN 'map' THEN s.source_slug END, s.map_path, s.max_items,
               s.when_empty, s.when_item_fails, s.child_workflow, s.child_payload, s.child_retries, s.max_children
        FROM step s
        WHERE s.workflow_slug = write_snapshot.workflow_slug AND EXISTS (SELECT FROM unedited);
        GET DIAGNOSTICS written = ROW_COUNT;
        IF written = definition.step_count THEN
            RETURN definition;
        END IF;
    ELSIF EXISTS (SELECT FROM pgflow.workflows w
                  WHERE w.slug = write_snapshot.workflow_slug AND w.version = definition.version) THEN
        RETURN definition;
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow.write_snapshot(text) IS
    'What snapshot does, once; NULL where an edit came between, and what was written is to be rolled back. Internal.';


CREATE OR REPLACE FUNCTION pgflow.snapshot(workflow_slug text) RETURNS pgflow.definitions
LANGUAGE plpgsql VOLATILE SECURITY DEFINER -- so that no role needs a right to write a snapshot of its own making
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET lock_timeout = '5s' -- twice; Python gives a statement up after 20 s, and can't say which lock it waits for
AS $$
#variable_conflict use_column
DECLARE
    definition pgflow.definitions;
BEGIN
    -- Wait for an edit that is under way, and let the lock go at once: an edit does not wait for the transaction that
    -- has started a run. An edit that takes too long counts from the next run.
    BEGIN
        PERFORM FROM pgflow.workflows w WHERE w.slug = snapshot.workflow_slug FOR NO KEY UPDATE;
        RAISE EXCEPTION USING ERRCODE = 'PF001';
    EXCEPTION WHEN lock_not_available OR SQLSTATE 'PF001' THEN
        NULL;
    END;

    FOR attempt IN 1 .. 4 LOOP
        BEGIN
            IF attempt = 4 THEN -- the workflow is being edited all the time: now the edits wait
                PERFORM FROM pgflow.workflows w WHERE w.slug = snapshot.workflow_slug FOR NO KEY UPDATE;
            END IF;
            definition := pgflow.write_snapshot(workflow_slug);
            IF definition.id IS NOT NULL THEN
                RETURN definition;
            END IF;
            RAISE EXCEPTION USING ERRCODE = 'PF001'; -- takes back what was written, and its locks
        EXCEPTION
            WHEN SQLSTATE 'PF001' THEN
                NULL;
            WHEN lock_not_available THEN
                RAISE EXCEPTION 'workflow "%" is locked by another transaction', workflow_slug
                    USING ERRCODE = 'lock_not_available',
                          HINT = 'Another transaction is deleting a step. Try again when it has ended.';
        END;
    END LOOP;
    RAISE EXCEPTION 'the snapshot of workflow "%" was not stored: a trigger or rule skipped it', workflow_slug
        USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
END
$$;

COMMENT ON FUNCTION pgflow.snapshot(text) IS
    'The immutable copy of the workflow as it is now, with every step''s in-degree; made once a version, or once more by a '
    'first run that does not see the other''s yet. It alone writes one, with the owner''s rights.';


CREATE OR REPLACE FUNCTION pgflow.find_definition(workflow_slug text) RETURNS pgflow.definitions
LANGUAGE plpgsql VOLATILE SECURITY DEFINER -- so that no role needs a right to lock a workflow's row by hand
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
    current_version bigint;
    definition pgflow.definitions;
BEGIN
    SELECT d.* INTO definition
    FROM pgflow.workflows w LEFT JOIN LATERAL (
        SELECT d.* FROM pgflow.definitions d
        WHERE d.workflow_slug = w.slug AND d.version = w.version ORDER BY d.id LIMIT 1) d ON true
    WHERE w.slug = find_definition.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', coalesce(workflow_slug, 'NULL') USING ERRCODE = 'no_data_found';
    END IF;
    IF definition.id IS NOT NULL THEN
        -- The lock that the foreign key takes anyway, a moment earlier: it keeps the steps of this version from
        -- being deleted until the run is there to be seen. Not waited for: a deletion that is under way makes a new
        -- version, and snapshot waits for it without holding a lock.
        PERFORM FROM pgflow.workflows w WHERE w.slug = find_definition.workflow_slug FOR KEY SHARE SKIP LOCKED;
        IF NOT FOUND THEN
            definition.id := NULL;
        ELSE
            -- Read again: this lock may have waited all the same, and returns the row as it was before that.
            SELECT w.version INTO current_version FROM pgflow.workflows w WHERE w.slug = find_definition.workflow_slug;
            IF current_version IS DISTINCT FROM definition.version THEN
                SELECT * INTO definition FROM pgflow.definitions d
                WHERE d.workflow_slug = find_definition.workflow_slug AND d.version = current_version
                ORDER BY d.id LIMIT 1;
            END IF;
        END IF;
    END IF;
    IF definition.id IS NULL THEN
        definition := pgflow.snapshot(workflow_slug);
    END IF;
    RETURN definition;
END
$$;

COMMENT ON FUNCTION pgflow.find_definition(text) IS
    'The snapshot that a run begins with now. Its steps are not deleted until the transaction ends. Internal.';


------------------------------------------------------------------------------------------------------------
-- Bounds of payloads, results and messages, for every statement that writes one
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.find_json_problem(document jsonb, is_payload boolean, of_others boolean DEFAULT true)
RETURNS text -- of_others: of version 2, and looked at no more
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    limits pgflow.limits;
    most int;
    size bigint;
BEGIN
    SELECT * INTO limits FROM pgflow.limits;
    IF jsonb_path_exists(document, format('strict $.**{%s} ? (@.type() == "array" || @.type() == "object")',
                                          limits.depth)::jsonpath) THEN
        RETURN format('nests arrays and objects more than %s deep', limits.depth);
    END IF;
    -- Before it is written as text: a number of ten bytes may have 131,072 digits there, and a document of a few bytes
    -- may be stored compressed.
    IF pgflow.has_long_number(document, limits.digits) THEN
        RETURN format('has a number of more than %s digits', limits.digits);
    END IF;
    BEGIN
        size := octet_length(document::text);
    EXCEPTION WHEN program_limit_exceeded OR out_of_memory THEN
        RETURN 'is too large to be written as text';
    END;
    most := CASE WHEN is_payload THEN limits.payload_bytes ELSE limits.result_bytes END;
    IF size > most THEN
        RETURN format('has %s bytes as text, more than the limit of %s', size, most);
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow.find_json_problem(jsonb, boolean, boolean) IS
    'In what a payload or a result is beyond pgflow.limits, as the end of a sentence; NULL where it is not. A document '
    'with a long number is not written as text to find that out.';


CREATE OR REPLACE FUNCTION pgflow.has_long_number(document jsonb, digits int) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    -- A 0 of 12 bytes may be written with 16,383 zeros. jsonpath does not tell how many digits a number has after its
    -- point. But the quotient has as many 3s, up to 1000. Both operations fail at once for what is no number.
    SELECT CASE WHEN digits <= 1000 THEN
        jsonb_path_exists(document, format('strict $.** ? (@.abs() >= 1e%s || %s)', digits, is_long)::jsonpath)
    ELSE
        jsonb_path_exists(document, format('strict $.** ? (@.abs() >= 1e%s)', digits)::jsonpath)
        OR EXISTS (SELECT FROM jsonb_path_query(document, format('strict $.** ? (%s)', is_long)::jsonpath) n
                   WHERE scale(n::numeric) > digits)
    END
    FROM (VALUES (format('1 / (@ * 0 + 3) > 0.%s', repeat('3', 999)))) AS after_its_point (is_long)
$$;

COMMENT ON FUNCTION pgflow.has_long_number(jsonb, int) IS
    'Whether a number in this document has more digits than that before its point, or behind it.';


CREATE OR REPLACE FUNCTION pgflow.check_json(document jsonb, is_payload boolean, what text) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    problem text := pgflow.find_json_problem(document, is_payload);
BEGIN
    IF problem IS NOT NULL THEN
        RAISE EXCEPTION '% %', what, problem
            USING ERRCODE = 'program_limit_exceeded', CONSTRAINT = 'json_limits',
                  HINT = 'The table pgflow.limits has the limits.';
    END IF;
    RETURN document;
END
$$;

COMMENT ON FUNCTION pgflow.check_json(jsonb, boolean, text) IS
    'Returns a document that is about to be handed out; 54000 where it is beyond pgflow.limits, as one may be that was '
    'written before there were limits.';


CREATE OR REPLACE FUNCTION pgflow.check_written() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER -- who writes need not be able to read the limits
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    is_payload CONSTANT boolean := TG_RELID = 'pgflow.runs'::regclass;
    is_item CONSTANT boolean := TG_RELID = 'pgflow.step_items'::regclass;
    is_condition CONSTANT boolean := TG_RELID = 'pgflow.steps'::regclass;
    problem text;
BEGIN
    IF TG_RELID NOT IN ('pgflow.runs'::regclass, 'pgflow.step_states'::regclass, 'pgflow.step_items'::regclass,
                        'pgflow.steps'::regclass) THEN
        RAISE EXCEPTION 'the trigger function pgflow.check_written is for pgflow.runs, pgflow.step_states, '
                        'pgflow.step_items and pgflow.steps, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF is_payload THEN
        problem := pgflow.find_json_problem(NEW.payload, is_payload);
    ELSIF is_condition THEN
        problem := coalesce(pgflow.find_json_problem(NEW.required_input_pattern, true),
                            pgflow.find_json_problem(NEW.forbidden_input_pattern, true));
    ELSIF is_item THEN
        problem := pgflow.find_json_problem(NEW.item_result, is_payload);
    ELSE
        problem := pgflow.find_json_problem(NEW.step_result, is_payload);
    END IF;
    IF problem IS NULL THEN
        RETURN NEW;
    ELSIF is_payload THEN
        RAISE EXCEPTION 'the payload of a run of workflow "%" %', NEW.workflow_slug, problem
            USING ERRCODE = 'invalid_parameter_value', CONSTRAINT = 'json_limits',
                  HINT = 'Store the data elsewhere and give its address; or the owner raises the limit in pgflow.limits.';
    END IF;
    IF is_condition THEN
        RAISE EXCEPTION 'a condition of step "%" of workflow "%" %', NEW.slug, NEW.workflow_slug, problem
            USING ERRCODE = 'invalid_parameter_value', CONSTRAINT = 'json_limits',
                  HINT = 'Let the condition name less; or the owner raises the limit in pgflow.limits.';
    END IF;
    IF is_item THEN
        RAISE EXCEPTION 'the result of item % of step "%" %', NEW.item_index, NEW.step_slug, problem
            USING ERRCODE = 'program_limit_exceeded', CONSTRAINT = 'json_limits',
                  HINT = 'Store the data elsewhere and return its address; or the owner raises the limit in pgflow.limits.';
    END IF;
    RAISE EXCEPTION 'the result of step "%" %', NEW.step_slug, problem
        USING ERRCODE = 'program_limit_exceeded', CONSTRAINT = 'json_limits',
              HINT = 'Store the data elsewhere and return its address; or the owner raises the limit in pgflow.limits.';
END
$$;

COMMENT ON FUNCTION pgflow.check_written() IS 'Refuses a payload, a condition or a result that is beyond pgflow.limits.';


CREATE OR REPLACE FUNCTION pgflow.shorten_message() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
BEGIN
    NEW.error_message := left(NEW.error_message, 10000) || ' ...';
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow.shorten_message() IS
    'Keeps as much of an error or of the reason of a cancellation as a person reads: logs and Prefect get it whole.';


DO $triggers$
DECLARE
    written text[];
    bounded text;
BEGIN
    -- What is small passes the trigger's condition, which calls no function of ours: the hot path pays no more.
    FOREACH written SLICE 1 IN ARRAY ARRAY[['runs', 'payload'], ['step_states', 'step_result'],
                                                   ['step_items', 'item_result']] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_trigger
                              WHERE tgrelid = ('pgflow.' || written[1])::regclass AND tgname = 'check_written');
        EXECUTE format(
            'CREATE TRIGGER check_written BEFORE INSERT OR UPDATE OF %1$I ON pgflow.%2$I FOR EACH ROW WHEN ('
            'pg_column_size(NEW.%1$I) > 2000 OR octet_length(NEW.%1$I::text) > 1000 '
            'OR jsonb_path_exists(NEW.%1$I, ''strict $.**{100}'')) EXECUTE FUNCTION pgflow.check_written()',
            written[2], written[1]);
    END LOOP;
    -- Each command that looks at the workflow reads its conditions.
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = 'pgflow.steps'::regclass AND tgname = 'check_written') THEN
        CREATE TRIGGER check_written BEFORE INSERT OR UPDATE OF required_input_pattern, forbidden_input_pattern
            ON pgflow.steps FOR EACH ROW
            WHEN (pg_column_size(NEW.required_input_pattern) > 2000 OR octet_length(NEW.required_input_pattern::text) > 1000
                  OR jsonb_path_exists(NEW.required_input_pattern, 'strict $.**{100}')
                  OR pg_column_size(NEW.forbidden_input_pattern) > 2000 OR octet_length(NEW.forbidden_input_pattern::text) > 1000
                  OR jsonb_path_exists(NEW.forbidden_input_pattern, 'strict $.**{100}'))
            EXECUTE FUNCTION pgflow.check_written();
    END IF;
    FOREACH bounded IN ARRAY ARRAY['runs', 'step_states', 'step_items'] LOOP
        CONTINUE WHEN EXISTS (SELECT FROM pg_catalog.pg_trigger
                              WHERE tgrelid = ('pgflow.' || bounded)::regclass AND tgname = 'shorten_message');
        EXECUTE format('CREATE TRIGGER shorten_message BEFORE INSERT OR UPDATE OF error_message ON pgflow.%I FOR EACH ROW '
                       'WHEN (length(NEW.error_message) > 10100) EXECUTE FUNCTION pgflow.shorten_message()', bounded);
    END LOOP;
END
$triggers$;


------------------------------------------------------------------------------------------------------------
-- What can start
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.get_root_steps(workflow_slug text) RETURNS SETOF pgflow.steps
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow.workflows w WHERE w.slug = get_root_steps.workflow_slug) THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    RETURN QUERY
        SELECT s.* FROM pgflow.steps s
        WHERE s.workflow_slug = get_root_steps.workflow_slug
          AND NOT EXISTS (SELECT FROM pgflow.deps d
                          WHERE d.workflow_slug = s.workflow_slug AND d.to_step_slug = s.slug)
        ORDER BY s.slug;
END
$$;

COMMENT ON FUNCTION pgflow.get_root_steps(text) IS
    'The steps of this workflow, as it is defined now, that wait for no other step.';


CREATE OR REPLACE FUNCTION pgflow.has_unmet_deps(run_id uuid, step_slug text) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    run record;
BEGIN
    SELECT r.id, r.workflow_slug, r.definition_id, r.uses_rules INTO run
    FROM pgflow.runs r WHERE r.id = has_unmet_deps.run_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', run_id USING ERRCODE = 'no_data_found';
    END IF;
    PERFORM pgflow.check_step(run.workflow_slug, run.definition_id, step_slug);
    IF run.definition_id IS NULL THEN -- inserted by hand: what it would begin with now
        RETURN EXISTS (
            SELECT FROM pgflow.deps d
            WHERE d.workflow_slug = run.workflow_slug AND d.to_step_slug = has_unmet_deps.step_slug
              AND NOT EXISTS (SELECT FROM pgflow.step_states s
                              WHERE s.run_id = run.id AND s.step_slug = d.from_step_slug
                                AND s.status = 'completed' OFFSET 0)); -- as in closes_cycle
    ELSIF run.uses_rules THEN
        RETURN EXISTS (SELECT FROM pgflow.count_steps(run.id, run.definition_id, ARRAY[has_unmet_deps.step_slug]) c
                       WHERE c.verdict IS DISTINCT FROM 'run');
    END IF;
    RETURN EXISTS (
        SELECT FROM pgflow.definition_deps d
        WHERE d.definition_id = run.definition_id AND d.to_step_slug = has_unmet_deps.step_slug
          AND NOT EXISTS (SELECT FROM pgflow.step_states s
                          WHERE s.run_id = run.id AND s.step_slug = d.from_step_slug
                            AND s.status = 'completed' OFFSET 0));
END
$$;

COMMENT ON FUNCTION pgflow.has_unmet_deps(uuid, text) IS
    'True while an upstream step, in the definition that the run began with, is not completed; in a run with rules, while '
    'the step''s rule does not say that it runs.';


CREATE OR REPLACE FUNCTION pgflow.check_step(workflow_slug text, definition_id bigint, step_slug text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    IF definition_id IS NULL THEN
        PERFORM FROM pgflow.steps s
        WHERE s.workflow_slug = check_step.workflow_slug AND s.slug = check_step.step_slug;
    ELSE
        PERFORM FROM pgflow.definition_steps s
        WHERE s.definition_id = check_step.definition_id AND s.slug = check_step.step_slug;
    END IF;
    IF FOUND THEN
        RETURN;
    END IF;
    RAISE EXCEPTION 'unknown step "%": workflow "%" of this run has no such step', step_slug, workflow_slug
        USING ERRCODE = 'no_data_found';
END
$$;

COMMENT ON FUNCTION pgflow.check_step(text, bigint, text) IS 'Raises P0002 where the definition has no such step.';


CREATE OR REPLACE FUNCTION pgflow.get_ready_steps(run_id uuid) RETURNS SETOF pgflow.steps
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET jit = off -- as in find_cycle
AS $$
#variable_conflict use_column
DECLARE
    run record;
BEGIN
    SELECT r.id, r.workflow_slug, r.definition_id, r.status, r.uses_rules INTO run
    FROM pgflow.runs r WHERE r.id = get_ready_steps.run_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', run_id USING ERRCODE = 'no_data_found';
    END IF;
    IF run.status <> 'pending' THEN
        RETURN;
    END IF;
    IF run.definition_id IS NULL THEN
        RETURN QUERY
            SELECT s.* FROM pgflow.steps s
            WHERE s.workflow_slug = run.workflow_slug
              AND NOT EXISTS (SELECT FROM pgflow.step_states t WHERE t.run_id = run.id AND t.step_slug = s.slug)
              AND NOT EXISTS (
                  SELECT FROM pgflow.deps d
                  LEFT JOIN pgflow.step_states u ON u.run_id = run.id AND u.step_slug = d.from_step_slug
                  WHERE d.workflow_slug = s.workflow_slug AND d.to_step_slug = s.slug
                    AND u.status IS DISTINCT FROM 'completed')
            ORDER BY s.slug;
        RETURN;
    ELSIF run.uses_rules THEN
        RETURN QUERY
            SELECT s.* FROM pgflow.count_upstream(run.id, run.definition_id) c
            JOIN pgflow.steps s ON s.workflow_slug = run.workflow_slug AND s.slug = c.slug
            WHERE NOT c.has_state AND c.verdict = 'run'
            ORDER BY s.slug;
        RETURN;
    END IF;
    RETURN QUERY
        SELECT s.* FROM pgflow.definition_steps ds
        JOIN pgflow.steps s ON s.workflow_slug = run.workflow_slug AND s.slug = ds.slug
        WHERE ds.definition_id = run.definition_id
          AND NOT EXISTS (SELECT FROM pgflow.step_states t WHERE t.run_id = run.id AND t.step_slug = ds.slug)
          AND NOT EXISTS (
              SELECT FROM pgflow.definition_deps d
              LEFT JOIN pgflow.step_states u ON u.run_id = run.id AND u.step_slug = d.from_step_slug
              WHERE d.definition_id = run.definition_id AND d.to_step_slug = ds.slug
                AND u.status IS DISTINCT FROM 'completed')
        ORDER BY s.slug;
END
$$;

COMMENT ON FUNCTION pgflow.get_ready_steps(uuid) IS
    'The steps of a pending run that have no state yet and whose upstream steps are all completed; in a run with rules, '
    'those whose rule says that they run.';


DO $counted$
BEGIN
    IF to_regprocedure('pgflow.count_states(uuid, bigint)') IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_proc
        WHERE oid = to_regprocedure('pgflow.count_states(uuid, bigint)') AND 'failures' = ANY (proargnames)) THEN
        DROP FUNCTION pgflow.count_states(uuid, bigint); -- it did not count failures
    END IF;
END
$counted$;

CREATE OR REPLACE FUNCTION pgflow.count_states(
    run_id uuid, definition_id bigint, OUT completed int, OUT failures int, OUT failed text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET jit = off -- as in find_cycle
AS $$
#variable_conflict use_column
BEGIN
    SELECT count(*) FILTER (WHERE s.status = 'completed'), count(*) FILTER (WHERE s.status = 'failed'),
           min(format('step "%s" failed: %s', s.step_slug, coalesce(s.error_message, 'no reason given')))
               FILTER (WHERE s.status = 'failed')
    INTO count_states.completed, count_states.failures, count_states.failed
    FROM pgflow.step_states s
    JOIN pgflow.definition_steps d ON d.definition_id = count_states.definition_id AND d.slug = s.step_slug
    WHERE s.run_id = count_states.run_id;
END
$$;

COMMENT ON FUNCTION pgflow.count_states(uuid, bigint) IS
    'How many steps of a definition a run has completed, how many have failed, and the reason of one. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_unmet(run_id uuid, definition_id bigint)
RETURNS TABLE (step_slug text, unmet int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET jit = off -- as in find_cycle
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.to_step_slug, (count(*) FILTER (WHERE s.status IS DISTINCT FROM 'completed'))::int
        FROM pgflow.definition_deps d
        LEFT JOIN pgflow.step_states s ON s.step_slug = d.from_step_slug AND s.run_id = count_unmet.run_id
        WHERE d.definition_id = count_unmet.definition_id AND d.to_in_degree > 1
        GROUP BY d.to_step_slug
        -- None completed: no row yet. All completed: it starts.
        HAVING count(*) FILTER (WHERE s.status = 'completed') BETWEEN 1 AND count(*) - 1;
END
$$;

COMMENT ON FUNCTION pgflow.count_unmet(uuid, bigint) IS
    'The joins of which a run has completed some upstream steps, and how many are still missing. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_deleted_step(workflow_slug text, definition_id bigint) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET jit = off -- as in find_cycle
AS $$
#variable_conflict use_column
BEGIN
    RETURN (SELECT d.slug FROM pgflow.definition_steps d
            WHERE d.definition_id = find_deleted_step.definition_id
              AND NOT EXISTS (SELECT FROM pgflow.steps s
                              WHERE s.workflow_slug = find_deleted_step.workflow_slug AND s.slug = d.slug)
            LIMIT 1);
END
$$;

COMMENT ON FUNCTION pgflow.find_deleted_step(text, bigint) IS
    'A step of this definition that its workflow does not have any more; NULL where there is none. Internal.';


------------------------------------------------------------------------------------------------------------
-- Transitions. Each locks the run's row first, then the step's, and reads what it decides by in statements of
-- its own after that: two upstream steps that finish at the same moment take turns, and the second one sees
-- the first. Each also updates the run's row, so that a REPEATABLE READ caller is told (40001) that it is late.
--
-- A BEFORE trigger or a rule of yours may skip a write without an error. Each transition checks that its rows were
-- written, and raises 09000 if they were not. Otherwise a run would wait for ever, or an owner would believe that another
-- one has taken the run.
--
-- None of them, and nothing that calls one, has a SET clause: triggers of yours on runs and step_states run inside, and
-- find the settings of your session. So each name is qualified here, also those of pg_catalog and its operators: with
-- any search_path, no object of another schema takes their place. IN, IS DISTINCT FROM, LIKE and a CASE of one value
-- can't name their operator, and are not used. A statement that needs a planner setting is in a function of its own that
-- only reads. refuse_policies does what row_security = off does elsewhere.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.is_under_policies() RETURNS boolean
LANGUAGE sql STABLE -- no SET clause: it becomes part of the expression that calls it
AS $$
    SELECT pg_catalog.row_security_active('pgflow.runs'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.step_states'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.waiting_steps'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.undone_steps'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.step_maps'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.step_items'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.definitions'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.definition_steps'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.definition_deps'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.workflows'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.steps'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow.deps'::pg_catalog.regclass)
$$;

COMMENT ON FUNCTION pgflow.is_under_policies() IS
    'True where row-level security applies to the current user in a table that runs are moved by.';


CREATE OR REPLACE FUNCTION pgflow.refuse_policies(VARIADIC schema_names text[] DEFAULT '{pgflow}') RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
DECLARE
    filtered text;
BEGIN
    SELECT n.nspname || '.' || c.relname INTO filtered
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = ANY (schema_names) AND c.relkind IN ('r', 'p') AND row_security_active(c.oid)
    ORDER BY c.relname <> 'runs', n.nspname, c.relname LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the role "%" may not see every row of %: the query would be affected by row-level security '
                        'policy for table "%"', current_user, filtered, split_part(filtered, '.', 2)
            USING ERRCODE = 'insufficient_privilege', CONSTRAINT = 'row_level_security',
                  HINT = format('Half of the rows is worse than none. Connect as the owner of the tables, or as a role '
                                'that has BYPASSRLS: ALTER ROLE %I BYPASSRLS.', current_user);
    END IF;
    RETURN false;
END
$$;

COMMENT ON FUNCTION pgflow.refuse_policies(text[]) IS
    'Raises 42501 where row-level security applies to the current user in a table of these schemas; else returns '
    'false. A policy that hides no row counts as well: the next one may.';


CREATE OR REPLACE FUNCTION pgflow.lock_run(run_id uuid) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) lock_run.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', coalesce(run_id::pg_catalog.text, 'NULL') USING ERRCODE = 'no_data_found';
    END IF;
    IF run.definition_id IS NULL AND run.status OPERATOR(pg_catalog.=) 'pending' THEN
        -- Inserted by hand, or before this script: its first transition.
        BEGIN
            PERFORM pgflow.snapshot(run.workflow_slug);
        EXCEPTION WHEN invalid_parameter_value OR no_data_found THEN -- no steps, or a cycle
            RETURN pgflow.end_run(run, pg_catalog.format('the run can''t begin: %s', SQLERRM));
        END;
        run := pgflow.recompute_run(run);
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.lock_run(uuid) IS
    'Locks the run''s row and returns it; P0002 where there is none. A run that was inserted by hand begins here: where '
    'its workflow has no steps or a cycle, it fails with that reason.';


CREATE OR REPLACE FUNCTION pgflow.announce_run(run pgflow.runs) RETURNS void
LANGUAGE sql VOLATILE -- no SET clause, as in is_under_policies
AS $$
    -- Only on a run's start and end: at commit, NOTIFY takes a lock that the whole database shares.
    SELECT pg_catalog.pg_notify('pgflow_runs', pg_catalog.json_build_object(
        'run_id', run.id, 'status', run.status)::pg_catalog.text)
$$;

COMMENT ON FUNCTION pgflow.announce_run(pgflow.runs) IS
    'NOTIFY pgflow_runs, ''{"run_id": ..., "status": ...}'': a hint, to be confirmed by a look at the row.';


CREATE OR REPLACE FUNCTION pgflow.begin_run(wanted pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    definition pgflow.definitions;
    run pgflow.runs;
    started bigint;
BEGIN
    IF wanted.payload IS NULL THEN
        RAISE EXCEPTION 'the payload of a run of workflow "%" is NULL', wanted.workflow_slug
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Give a JSON value, ''{}'' for none.';
    END IF;
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    definition := pgflow.find_definition(wanted.workflow_slug);
    INSERT INTO pgflow.runs (workflow_slug, id, payload, definition_id, remaining, uses_rules, continues, logical_date,
                             data_interval, backfill_id, parent_run_id, parent_step_slug, parent_item, parent_attempt)
    VALUES (wanted.workflow_slug, coalesce(wanted.id, pg_catalog.gen_random_uuid()), wanted.payload, definition.id,
            definition.step_count, definition.uses_rules, definition.continues, wanted.logical_date, wanted.data_interval,
            wanted.backfill_id, wanted.parent_run_id, wanted.parent_step_slug, wanted.parent_item, wanted.parent_attempt)
    ON CONFLICT (id) DO NOTHING
    RETURNING * INTO run;
    IF NOT FOUND THEN
        SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) wanted.id;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'the run of workflow "%" was not stored: a trigger or rule on pgflow.runs skipped it',
                            wanted.workflow_slug
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        ELSIF run.workflow_slug OPERATOR(pg_catalog.<>) wanted.workflow_slug THEN
            RAISE EXCEPTION 'run % exists already, of workflow "%"', run.id, run.workflow_slug
                USING ERRCODE = 'invalid_parameter_value';
        END IF;
        RETURN run;
    END IF;

    IF run.uses_rules THEN
        PERFORM pgflow.announce_run(run);
        RETURN pgflow.begin_by_rules(run);
    END IF;
    INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
    SELECT run.workflow_slug, run.id, s.slug
    FROM pgflow.definition_steps s
    WHERE s.definition_id OPERATOR(pg_catalog.=) definition.id AND s.in_degree OPERATOR(pg_catalog.=) 0;
    GET DIAGNOSTICS started = ROW_COUNT;
    IF started OPERATOR(pg_catalog.<) (
        SELECT pg_catalog.count(*) FROM pgflow.definition_steps s
        WHERE s.definition_id OPERATOR(pg_catalog.=) definition.id AND s.in_degree OPERATOR(pg_catalog.=) 0
    ) THEN
        RAISE EXCEPTION 'a step of run % was not started: a trigger or rule on pgflow.step_states skipped it', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;

    PERFORM pgflow.announce_run(run);
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.begin_run(pgflow.runs) IS
    'run_workflow for a run about which more is known than its payload: logical_date, data_interval, backfill_id.';


CREATE OR REPLACE FUNCTION pgflow.run_workflow(
    workflow_slug text, payload jsonb, run_id uuid DEFAULT gen_random_uuid()
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    wanted pgflow.runs;
BEGIN
    wanted.workflow_slug := run_workflow.workflow_slug;
    wanted.id := run_workflow.run_id;
    wanted.payload := run_workflow.payload;
    RETURN pgflow.begin_run(wanted);
END
$$;

COMMENT ON FUNCTION pgflow.run_workflow(text, jsonb, uuid) IS
    'Starts a run and its root steps; the same run_id again returns the run that exists.';


CREATE OR REPLACE FUNCTION pgflow.start_step(run_id uuid, step_slug text) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
BEGIN
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) start_step.step_slug;
    IF FOUND THEN
        RETURN state;
    END IF;
    PERFORM pgflow.check_step(run.workflow_slug, run.definition_id, step_slug);
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RAISE EXCEPTION 'step "%" can''t start: run % is %', step_slug, run.id, run.status
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    IF run.uses_rules THEN
        RETURN pgflow.start_by_rules(run, step_slug);
    ELSIF pgflow.has_unmet_deps(run.id, step_slug) THEN
        RAISE EXCEPTION 'step "%" of run % can''t start: a step that it waits for is not completed', step_slug, run.id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
    VALUES (run.workflow_slug, run.id, start_step.step_slug)
    ON CONFLICT (run_id, step_slug) DO NOTHING -- as in snapshot
    RETURNING * INTO state;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'step "%" of run % was not started: a trigger or rule on pgflow.step_states skipped it',
                        step_slug, run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.start_step(uuid, text) IS
    'Makes a step pending, if its upstream steps are completed; already started: its state as it is. In a run with rules, '
    'decides it by its rule.';


CREATE OR REPLACE FUNCTION pgflow.unaccepted_state(run pgflow.runs, step_slug text, doing text)
RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    state pgflow.step_states;
BEGIN
    SELECT * INTO state
    FROM pgflow.step_states s WHERE s.run_id = run.id AND s.step_slug = unaccepted_state.step_slug;
    IF FOUND THEN
        RETURN state;
    END IF;
    PERFORM pgflow.check_step(run.workflow_slug, run.definition_id, step_slug);
    RAISE EXCEPTION 'step "%" of run % can''t be %: it has not been started', step_slug, run.id, doing
        USING ERRCODE = 'object_not_in_prerequisite_state';
END
$$;

COMMENT ON FUNCTION pgflow.unaccepted_state(pgflow.runs, text, text) IS
    'The state of a step that a transition did not apply to; an error that says why where it has none.';


CREATE OR REPLACE FUNCTION pgflow.claim_step(
    run_id uuid, step_slug text, epoch int DEFAULT NULL,
    upstream text[] DEFAULT NULL, with_payload boolean DEFAULT true
) RETURNS TABLE (status text, attempt int, step_result jsonb, payload jsonb, upstream_results jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
BEGIN
    IF claim_step.epoch OPERATOR(pg_catalog.<>) run.epoch THEN
        RAISE EXCEPTION 'step "%" of run % can''t be claimed in epoch %: the run is in epoch %',
                        step_slug, run.id, epoch, run.epoch
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_epoch',
                  HINT = 'Another owner has taken the run: stop working on it.';
    END IF;
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        PERFORM pgflow.check_step(run.workflow_slug, run.definition_id, step_slug);
        RAISE EXCEPTION 'step "%" can''t be claimed: run % is %', step_slug, run.id, run.status
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_status';
    END IF;

    UPDATE pgflow.step_states s
    SET attempts = s.attempts OPERATOR(pg_catalog.+) 1, started_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) claim_step.step_slug
      AND s.status OPERATOR(pg_catalog.=) 'pending'
    RETURNING s.* INTO state;
    IF NOT FOUND THEN
        state := pgflow.unaccepted_state(run, step_slug, 'claimed');
        IF state.status OPERATOR(pg_catalog.=) 'failed' THEN
            RAISE EXCEPTION 'step "%" of run % can''t be claimed: it has failed', step_slug, run.id
                USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'step_states_status';
        ELSIF state.status OPERATOR(pg_catalog.=) 'completed' THEN
            RETURN QUERY SELECT state.status, state.attempts, state.step_result,
                                NULL::pg_catalog.jsonb, NULL::pg_catalog.jsonb;
            RETURN;
        END IF;
        state.started_at := NULL;
    ELSIF run.uses_rules AND (pgflow.find_step(run.definition_id, step_slug)).child_workflow IS NOT NULL THEN
        -- Another attempt would take the step from its child, whose end would then be one of a former attempt.
        RAISE EXCEPTION 'step "%" of run % can''t be claimed: it is a run of another workflow', step_slug, run.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'The end of that run ends the step. Execute the steps of that run.';
    END IF;
    IF state.started_at IS NULL THEN
        RAISE EXCEPTION 'the claim of step "%" of run % was not stored: a trigger or rule on pgflow.step_states '
                        'skipped it', step_slug, run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;

    -- What is small, and has no number of many digits, is not looked at by a function. A long 0 is small: see
    -- has_long_number.
    IF with_payload THEN
        payload := CASE WHEN pg_catalog.pg_column_size(run.payload) OPERATOR(pg_catalog.>) 2000
                             OR pg_catalog.jsonb_path_exists(run.payload,
                                'strict $.** ? (@.abs() >= 1e1000 || 1 / (@ * 0 + 3) > 0.333333333333333333333333333333)')
                             OR pg_catalog.octet_length(run.payload::pg_catalog.text) OPERATOR(pg_catalog.>) 1000
                             OR pg_catalog.jsonb_path_exists(run.payload, 'strict $.**{100}')
                        THEN pgflow.check_json(run.payload, true, pg_catalog.format('the payload of run %s', run.id))
                        ELSE run.payload END;
    END IF;
    IF claim_step.upstream IS NULL OR pg_catalog.cardinality(claim_step.upstream) OPERATOR(pg_catalog.>) 0 THEN
        SELECT pg_catalog.jsonb_object_agg(s.step_slug, CASE
                   WHEN pg_catalog.pg_column_size(s.step_result) OPERATOR(pg_catalog.>) 2000
                        OR pg_catalog.jsonb_path_exists(s.step_result,
                           'strict $.** ? (@.abs() >= 1e1000 || 1 / (@ * 0 + 3) > 0.333333333333333333333333333333)')
                        OR pg_catalog.octet_length(s.step_result::pg_catalog.text) OPERATOR(pg_catalog.>) 1000
                        OR pg_catalog.jsonb_path_exists(s.step_result, 'strict $.**{100}')
                   THEN pgflow.check_json(s.step_result, false,
                                          pg_catalog.format('the result of step "%s"', s.step_slug))
                   ELSE s.step_result END)
        INTO upstream_results
        FROM pgflow.definition_deps d
        CROSS JOIN LATERAL (
            SELECT s.step_slug, s.step_result FROM pgflow.step_states s
            WHERE s.run_id OPERATOR(pg_catalog.=) run.id
              AND s.step_slug OPERATOR(pg_catalog.=) d.from_step_slug
              -- A rule may have started this step before another one above it has ended.
              AND s.status OPERATOR(pg_catalog.=) 'completed' AND s.skip_reason IS NULL OFFSET 0 -- as in closes_cycle
        ) s
        WHERE d.definition_id OPERATOR(pg_catalog.=) run.definition_id
          AND d.to_step_slug OPERATOR(pg_catalog.=) claim_step.step_slug
          AND (claim_step.upstream IS NULL OR d.from_step_slug OPERATOR(pg_catalog.=) ANY (claim_step.upstream));
    END IF;
    RETURN QUERY SELECT state.status, state.attempts, NULL::pg_catalog.jsonb, payload, coalesce(upstream_results, '{}');
END
$$;

COMMENT ON FUNCTION pgflow.claim_step(uuid, text, int, text[], boolean) IS
    'For the process that executes a step: counts the attempt and gives the payload and the results of the upstream steps '
    '(upstream: only of these); of a completed step the stored result. Refuses a finished run and a stale epoch.';


CREATE OR REPLACE FUNCTION pgflow.complete_step(
    run_id uuid, step_slug text, step_result jsonb, epoch int DEFAULT NULL, attempt int DEFAULT NULL
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
    next_steps pg_catalog.text[];    -- downstream steps with this one upstream step
    joining_steps pg_catalog.text[]; -- downstream steps with several ...
    met_steps pg_catalog.text[];     -- ... of which this was the last one
    met pg_catalog.text;
    started bigint;
    remaining CONSTANT int := run.remaining OPERATOR(pg_catalog.-) 1;
BEGIN
    UPDATE pgflow.step_states s
    SET status = 'completed', step_result = complete_step.step_result, finished_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) complete_step.step_slug
      AND s.status OPERATOR(pg_catalog.=) 'pending'
      AND (complete_step.epoch IS NULL OR complete_step.epoch OPERATOR(pg_catalog.=) run.epoch)
      -- A step that was reopened and not claimed again has no attempt under way.
      AND (complete_step.attempt IS NULL
           OR (complete_step.attempt OPERATOR(pg_catalog.=) s.attempts AND s.started_at IS NOT NULL))
    RETURNING s.* INTO state;
    IF NOT FOUND THEN
        state := pgflow.unaccepted_state(run, step_slug, 'completed');
        IF (state.status OPERATOR(pg_catalog.=) 'pending'
            AND (complete_step.epoch IS NULL OR complete_step.epoch OPERATOR(pg_catalog.=) run.epoch)
            AND (complete_step.attempt IS NULL
                 OR (complete_step.attempt OPERATOR(pg_catalog.=) state.attempts
                     AND state.started_at IS NOT NULL))) IS NOT TRUE THEN
            RETURN state;
        END IF;
    END IF;
    IF state.status OPERATOR(pg_catalog.<>) 'completed' THEN
        RAISE EXCEPTION 'the completion of step "%" of run % was not stored: a trigger or rule on pgflow.step_states '
                        'skipped it', step_slug, run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;

    IF run.uses_rules THEN
        PERFORM pgflow.settle(run, ARRAY[complete_step.step_slug], ARRAY['success'::pg_catalog.text]);
        RETURN state;
    END IF;

    SELECT pg_catalog.array_agg(d.to_step_slug) FILTER (WHERE d.to_in_degree OPERATOR(pg_catalog.=) 1),
           pg_catalog.array_agg(d.to_step_slug) FILTER (WHERE d.to_in_degree OPERATOR(pg_catalog.>) 1)
    INTO next_steps, joining_steps
    FROM pgflow.definition_deps d
    WHERE d.definition_id OPERATOR(pg_catalog.=) run.definition_id
      AND d.from_step_slug OPERATOR(pg_catalog.=) complete_step.step_slug;

    IF joining_steps IS NOT NULL THEN
        -- Counted, not looked at: a completion costs as much as it has downstream steps, however wide the join.
        WITH counted AS (
            INSERT INTO pgflow.waiting_steps AS w (run_id, step_slug, unmet)
            SELECT run.id, d.to_step_slug, d.to_in_degree OPERATOR(pg_catalog.-) 1
            FROM pgflow.definition_deps d
            WHERE d.definition_id OPERATOR(pg_catalog.=) run.definition_id
              AND d.from_step_slug OPERATOR(pg_catalog.=) complete_step.step_slug
              AND d.to_in_degree OPERATOR(pg_catalog.>) 1
            ON CONFLICT (run_id, step_slug) DO UPDATE SET unmet = w.unmet OPERATOR(pg_catalog.-) 1
            RETURNING w.step_slug, w.unmet
        ) SELECT coalesce(pg_catalog.array_agg(c.step_slug), '{}') INTO met_steps
        FROM counted c WHERE c.unmet OPERATOR(pg_catalog.=) 0;
        FOREACH met IN ARRAY met_steps LOOP -- one by one: a join may be planned to read all of the run's
            DELETE FROM pgflow.waiting_steps w
            WHERE w.run_id OPERATOR(pg_catalog.=) run.id AND w.step_slug OPERATOR(pg_catalog.=) met;
        END LOOP;
        next_steps := next_steps OPERATOR(pg_catalog.||) met_steps;
    END IF;

    IF run.status OPERATOR(pg_catalog.=) 'pending' AND pg_catalog.cardinality(next_steps) OPERATOR(pg_catalog.>) 0
    THEN
        IF pg_catalog.cardinality(next_steps) OPERATOR(pg_catalog.=) 1 THEN -- most often: a function scan costs 6 us
            INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
            VALUES (run.workflow_slug, run.id, next_steps[1])
            ON CONFLICT (run_id, step_slug) DO NOTHING; -- started by hand
        ELSE
            INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
            SELECT run.workflow_slug, run.id, ready.slug FROM pg_catalog.unnest(next_steps) AS ready(slug)
            ON CONFLICT (run_id, step_slug) DO NOTHING;
        END IF;
        GET DIAGNOSTICS started = ROW_COUNT;
        IF started OPERATOR(pg_catalog.<) pg_catalog.cardinality(next_steps) THEN
            FOREACH met IN ARRAY next_steps LOOP
                PERFORM FROM pgflow.step_states s
                WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) met;
                IF NOT FOUND THEN
                    RAISE EXCEPTION 'step "%" of run % was not started: a trigger or rule on pgflow.step_states '
                                    'skipped it', met, run.id
                        USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
                END IF;
            END LOOP;
        END IF;
    END IF;

    UPDATE pgflow.runs r
    SET remaining = r.remaining OPERATOR(pg_catalog.-) 1,
        status = CASE WHEN r.status OPERATOR(pg_catalog.=) 'pending' AND r.remaining OPERATOR(pg_catalog.=) 1
                      THEN 'completed' ELSE r.status END,
        finished_at = CASE WHEN r.status OPERATOR(pg_catalog.=) 'pending' AND r.remaining OPERATOR(pg_catalog.=) 1
                           THEN pg_catalog.clock_timestamp() ELSE r.finished_at END
    WHERE r.id OPERATOR(pg_catalog.=) run.id
    RETURNING r.* INTO run;
    IF (run.remaining OPERATOR(pg_catalog.=) remaining) IS NOT TRUE THEN
        RAISE EXCEPTION 'run % did not count the completion of step "%": a trigger or rule on pgflow.runs skipped it',
                        complete_step.run_id, step_slug
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    ELSIF run.status OPERATOR(pg_catalog.=) 'completed' THEN
        PERFORM pgflow.announce_run(run);
        IF run.backfill_id IS NOT NULL THEN
            PERFORM pgflow.continue_backfills(run.id);
        END IF;
        IF run.parent_run_id IS NOT NULL THEN
            PERFORM pgflow.report_to_parent(run);
        END IF;
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.complete_step(uuid, text, jsonb, int, int) IS
    'Stores the result of a pending step, starts the steps that became ready, completes the run after its last '
    'step. The first report wins: any later one, or one of a stale epoch or attempt, returns the row unchanged.';


CREATE OR REPLACE FUNCTION pgflow.fail_step(
    run_id uuid, step_slug text, error_message text, epoch int DEFAULT NULL, attempt int DEFAULT NULL
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
BEGIN
    IF run.uses_rules THEN
        RETURN pgflow.fail_by_rules(run, step_slug, error_message, epoch, attempt);
    END IF;
    UPDATE pgflow.step_states s
    SET status = 'failed', ended_as = NULL, error_message = fail_step.error_message,
        finished_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) fail_step.step_slug
      AND s.status OPERATOR(pg_catalog.=) 'pending'
      AND (fail_step.epoch IS NULL OR fail_step.epoch OPERATOR(pg_catalog.=) run.epoch)
      AND (fail_step.attempt IS NULL OR (fail_step.attempt OPERATOR(pg_catalog.=) s.attempts
        AND s.started_at IS NOT NULL))
    RETURNING s.* INTO state;
    IF NOT FOUND THEN
        state := pgflow.unaccepted_state(run, step_slug, 'failed');
        IF (state.status OPERATOR(pg_catalog.=) 'pending'
            AND (fail_step.epoch IS NULL OR fail_step.epoch OPERATOR(pg_catalog.=) run.epoch)
            AND (fail_step.attempt IS NULL
                 OR (fail_step.attempt OPERATOR(pg_catalog.=) state.attempts
                     AND state.started_at IS NOT NULL))) IS NOT TRUE THEN
            RETURN state;
        END IF;
    END IF;
    IF state.status OPERATOR(pg_catalog.<>) 'failed' THEN
        RAISE EXCEPTION 'the failure of step "%" of run % was not stored: a trigger or rule on pgflow.step_states '
                        'skipped it', step_slug, run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    PERFORM pgflow.end_run(run, pg_catalog.format('step "%s" failed: %s', step_slug,
                                                  coalesce(error_message, 'no reason given')));
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.fail_step(uuid, text, text, int, int) IS
    'Fails a pending step and its run: claimed steps may still finish, nothing new starts. The first report wins. In a '
    'run with rules the step may be skipped instead (when_exhausted), and the run may go on (when_failed).';


CREATE OR REPLACE FUNCTION pgflow.end_run(
    run pgflow.runs, reason text, ended_as pgflow.ending DEFAULT NULL
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    failed pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    UPDATE pgflow.runs r
    SET status = 'failed', ended_as = end_run.ended_as, error_message = end_run.reason,
        finished_at = pg_catalog.clock_timestamp()
    -- By its id. With `status = 'pending'` and old statistics, the index of pending runs is read from end to end.
    WHERE r.id OPERATOR(pg_catalog.=) run.id AND coalesce(r.status, '') OPERATOR(pg_catalog.=) 'pending'
    RETURNING r.* INTO failed;
    IF NOT FOUND AND run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RETURN run;
    ELSIF (failed.status OPERATOR(pg_catalog.=) 'failed') IS NOT TRUE THEN
        RAISE EXCEPTION 'the failure of run % was not stored: a trigger or rule on pgflow.runs skipped it', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    PERFORM pgflow.announce_run(failed);
    IF failed.backfill_id IS NOT NULL THEN
        PERFORM pgflow.continue_backfills(failed.id);
    END IF;
    IF failed.parent_run_id IS NOT NULL THEN
        PERFORM pgflow.report_to_parent(failed);
    END IF;
    RETURN failed;
END
$$;

COMMENT ON FUNCTION pgflow.end_run(pgflow.runs, text, pgflow.ending) IS
    'Fails a locked run, if it is pending, and notes how it ended. Internal.';


DO $renamed$
BEGIN
    IF to_regprocedure('pgflow.fail_run(pgflow.runs, text)') IS NOT NULL THEN
        DROP FUNCTION pgflow.fail_run(pgflow.runs, text); -- 2 had end_run by this name
    END IF;
END
$renamed$;


CREATE OR REPLACE FUNCTION pgflow.set_epoch(run pgflow.runs, epoch int, taken_in int) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    taken int;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    UPDATE pgflow.runs r SET epoch = set_epoch.epoch, taken_in = set_epoch.taken_in
    WHERE r.id OPERATOR(pg_catalog.=) run.id
    RETURNING r.epoch INTO taken;
    IF (taken OPERATOR(pg_catalog.=) set_epoch.epoch) IS NOT TRUE THEN
        RAISE EXCEPTION 'run % can''t be taken: a trigger or rule on pgflow.runs skipped the update', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    RETURN taken;
END
$$;

COMMENT ON FUNCTION pgflow.set_epoch(pgflow.runs, int, int) IS
    'Puts a locked run into an epoch, and notes in which one a service has taken it. Internal.';


CREATE OR REPLACE FUNCTION pgflow.take_run(run_id uuid) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
BEGIN
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RAISE EXCEPTION 'run % can''t be taken: it is %', run.id, run.status
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_status';
    END IF;
    RETURN pgflow.set_epoch(run, run.epoch OPERATOR(pg_catalog.+) 1, run.taken_in);
END
$$;

COMMENT ON FUNCTION pgflow.take_run(uuid) IS
    'Raises the run''s epoch and returns it: claims and reports that carry an older one are refused from now on.';


-- No SET clause: triggers of users on the two tables run inside.
CREATE OR REPLACE FUNCTION pgflow.break_off_run(run_id uuid, reason text, ended_as pgflow.ending)
RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    -- Not by lock_run: a run that has not begun, or can't, ends without beginning.
    SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) break_off_run.run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown run %', coalesce(break_off_run.run_id::pg_catalog.text, 'NULL')
            USING ERRCODE = 'no_data_found';
    ELSIF run.status OPERATOR(pg_catalog.=) 'completed' THEN
        RETURN run;
    END IF;
    UPDATE pgflow.step_states s
    SET status = 'failed', ended_as = break_off_run.ended_as, error_message = break_off_run.reason,
        finished_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.status OPERATOR(pg_catalog.=) 'pending';
    PERFORM FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.status OPERATOR(pg_catalog.=) 'pending';
    IF FOUND THEN
        RAISE EXCEPTION 'the steps of run % were not %: a trigger or rule on pgflow.step_states skipped it',
                        run.id, coalesce(break_off_run.ended_as::pg_catalog.text, 'failed')
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    run := pgflow.end_run(run, break_off_run.reason, break_off_run.ended_as);
    IF run.uses_rules THEN
        PERFORM pgflow.leave_children(run.id, NULL);
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.break_off_run(uuid, text, pgflow.ending) IS
    'What cancel_run and fail_run have in common. Internal.';


CREATE OR REPLACE FUNCTION pgflow.cancel_run(run_id uuid, reason text DEFAULT 'cancelled') RETURNS pgflow.runs
LANGUAGE sql VOLATILE
AS $$ SELECT pgflow.break_off_run(cancel_run.run_id, coalesce(cancel_run.reason, 'cancelled'), 'cancelled') $$;

COMMENT ON FUNCTION pgflow.cancel_run(uuid, text) IS
    'Ends the run and all its pending steps as cancelled: status failed, ended_as cancelled, and this reason. A finished '
    'run stays as it is.';


CREATE OR REPLACE FUNCTION pgflow.fail_run(run_id uuid, reason text DEFAULT NULL) RETURNS pgflow.runs
LANGUAGE sql VOLATILE
AS $$ SELECT pgflow.break_off_run(fail_run.run_id, coalesce(fail_run.reason, 'failed'), NULL) $$;

COMMENT ON FUNCTION pgflow.fail_run(uuid, text) IS
    'Fails the run and all its pending steps with this reason, for a run that can''t go on. Unlike a cancelled run, '
    'Retry in Prefect reopens it. A finished run stays as it is.';


CREATE OR REPLACE FUNCTION pgflow.reopen_run(run_id uuid) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    gone pg_catalog.text;
BEGIN
    IF run.status OPERATOR(pg_catalog.=) 'pending' THEN
        RETURN run;
    ELSIF run.status OPERATOR(pg_catalog.=) 'completed' THEN
        RAISE EXCEPTION 'run % can''t be reopened: it is completed', run.id
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_status';
    END IF;
    IF run.parent_run_id IS NOT NULL THEN
        PERFORM pgflow.await_child_again(run);
    END IF;
    gone := pgflow.find_deleted_step(run.workflow_slug, run.definition_id);
    IF gone IS NOT NULL THEN
        RAISE EXCEPTION 'run % can''t be reopened: its step "%" has been deleted from workflow "%"',
                        run.id, gone, run.workflow_slug
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;

    IF run.uses_rules THEN
        PERFORM pgflow.take_back(run);
    ELSE
        UPDATE pgflow.step_states s
        SET status = 'pending', ended_as = NULL, error_message = NULL, started_at = NULL, finished_at = NULL
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.status OPERATOR(pg_catalog.=) 'failed';
    END IF;
    UPDATE pgflow.runs r
    SET status = 'pending', ended_as = NULL, error_message = NULL, finished_at = NULL,
        epoch = r.epoch OPERATOR(pg_catalog.+) 1
    WHERE r.id OPERATOR(pg_catalog.=) run.id
    RETURNING r.* INTO run;
    IF (run.status OPERATOR(pg_catalog.=) 'pending') IS NOT TRUE THEN
        RAISE EXCEPTION 'run % was not reopened: a trigger or rule on pgflow.runs skipped it', reopen_run.run_id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    PERFORM pgflow.announce_run(run);
    IF run.backfill_id IS NOT NULL THEN
        PERFORM pgflow.await_again(run.id);
    END IF;
    RETURN pgflow.recompute_run(run);
END
$$;

COMMENT ON FUNCTION pgflow.reopen_run(uuid) IS
    'Makes a failed run pending again with its failed steps; completed steps keep their results; the epoch rises. In a run '
    'with rules, what was decided because of the failures is decided anew, and a cleanup step runs once more.';


CREATE OR REPLACE FUNCTION pgflow.recompute_run(run pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    definition pgflow.definitions;
    completed int;
    failed pg_catalog.text;
    counted pgflow.runs;
    was_pending boolean := run.status OPERATOR(pg_catalog.=) 'pending';
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    IF run.definition_id IS NULL THEN
        definition := pgflow.snapshot(run.workflow_slug);
    ELSE
        SELECT * INTO definition FROM pgflow.definitions d WHERE d.id OPERATOR(pg_catalog.=) run.definition_id;
    END IF;
    IF definition.uses_rules OR run.uses_rules THEN
        RETURN pgflow.recompute_rules(run, definition);
    END IF;
    SELECT c.completed, c.failed INTO completed, failed FROM pgflow.count_states(run.id, definition.id) c;

    DELETE FROM pgflow.waiting_steps w WHERE w.run_id OPERATOR(pg_catalog.=) run.id;
    INSERT INTO pgflow.waiting_steps (run_id, step_slug, unmet)
    SELECT run.id, c.step_slug, c.unmet FROM pgflow.count_unmet(run.id, definition.id) c;

    UPDATE pgflow.runs r
    SET definition_id = definition.id, remaining = definition.step_count OPERATOR(pg_catalog.-) completed,
        status = CASE WHEN was_pending AND definition.step_count OPERATOR(pg_catalog.=) completed
                      THEN 'completed' ELSE r.status END,
        finished_at = CASE WHEN was_pending AND definition.step_count OPERATOR(pg_catalog.=) completed
                           THEN pg_catalog.clock_timestamp() ELSE r.finished_at END
    WHERE r.id OPERATOR(pg_catalog.=) run.id
    RETURNING r.* INTO counted;
    IF counted.definition_id IS NULL THEN
        RAISE EXCEPTION 'run % can''t begin: a trigger or rule on pgflow.runs skipped the update', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    run := counted;
    IF run.status OPERATOR(pg_catalog.=) 'completed' AND was_pending THEN
        PERFORM pgflow.announce_run(run);
        IF run.backfill_id IS NOT NULL THEN
            PERFORM pgflow.continue_backfills(run.id);
        END IF;
        IF run.parent_run_id IS NOT NULL THEN
            PERFORM pgflow.report_to_parent(run);
        END IF;
    ELSIF run.status OPERATOR(pg_catalog.=) 'pending' AND failed IS NOT NULL THEN
        RETURN pgflow.end_run(run, failed);
    ELSIF run.status OPERATOR(pg_catalog.=) 'pending' THEN
        INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
        SELECT run.workflow_slug, run.id, ready.slug FROM pgflow.get_ready_steps(run.id) ready;
        IF EXISTS (SELECT FROM pgflow.get_ready_steps(run.id)) THEN
            RAISE EXCEPTION 'a step of run % was not started: a trigger or rule on pgflow.step_states skipped it',
                            run.id
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        END IF;
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.recompute_run(pgflow.runs) IS
    'What repair_run does, to a run that is locked; a run without a definition gets the current one. Internal.';


CREATE OR REPLACE FUNCTION pgflow.repair_run(run_id uuid) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
BEGIN
    IF run.status OPERATOR(pg_catalog.=) 'failed' AND run.definition_id IS NULL THEN
        RETURN run; -- it never began: there is nothing to count
    END IF;
    RETURN pgflow.recompute_run(run);
END
$$;

COMMENT ON FUNCTION pgflow.repair_run(uuid) IS
    'After rows were written by hand: counts again from step_states, starts what is ready, ends what is done.';


------------------------------------------------------------------------------------------------------------
-- Rules: what becomes of a step once its upstream steps have ended. Only runs that use them come here.
--
-- A step ends in one of five ways, its outcome: success; skip (the steps below go on without it); skip-cascade (they are
-- skipped with it, unless their rule says otherwise); failed; not_run (a step above has failed, and its rule can't be
-- met any more). In the tables a skipped step is completed with a skip_reason, and one that is not run is failed with
-- the skip_reason dependency_failed: programs that look at the status alone still decide right.
--
-- The functions that write runs or step_states have no SET clause, as above. Others that look up several rows by their
-- keys set all that the planner chooses by, for one may call another, and a setting holds in what is called. JIT is off with them: up to
-- PostgreSQL 17 a forbidden plan looks so expensive that it would be compiled at every call.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.outcome_of(status text, skip_reason text, skip_cascades boolean) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    SELECT CASE status
        WHEN 'completed' THEN CASE WHEN skip_reason IS NULL THEN 'success'
                                   WHEN skip_cascades THEN 'skip-cascade' ELSE 'skip' END
        WHEN 'failed' THEN CASE skip_reason WHEN 'dependency_failed' THEN 'not_run' ELSE 'failed' END END
$$;

COMMENT ON FUNCTION pgflow.outcome_of(text, text, boolean) IS
    'How a step has ended: success, skip, skip-cascade, failed, not_run; NULL while it is pending.';


CREATE OR REPLACE FUNCTION pgflow.may_follow_failure(rule text) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    SELECT coalesce(rule NOT IN ('all_success', 'none_failed', 'none_failed_min_one_success', 'all_skipped'), false)
$$;

COMMENT ON FUNCTION pgflow.may_follow_failure(text) IS
    'Whether a step with this rule may run although a step above it has failed.';


CREATE OR REPLACE FUNCTION pgflow.decide_step(
    rule text, upstream int, unmet int, skipped int, cascaded int, failed int, not_run int,
    setups int, setups_ok int, setups_skipped int
) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    SELECT CASE
        WHEN upstream = 0 OR rule = 'always' THEN 'run'
        -- What no later end can change.
        WHEN rule = 'one_success' AND upstream > unmet + skipped + cascaded + failed + not_run THEN 'run'
        WHEN rule = 'one_failed' AND failed + not_run > 0 THEN 'run'
        WHEN rule = 'one_done' AND upstream > unmet + skipped + cascaded + not_run THEN 'run'
        WHEN rule = 'all_failed' AND upstream > unmet + failed + not_run THEN 'skip'
        WHEN rule = 'all_skipped' AND upstream > unmet + skipped + cascaded THEN 'skip'
        WHEN rule IN ('none_skipped', 'all_done_min_one_success') AND skipped + cascaded > 0 THEN 'skip'
        WHEN NOT pgflow.may_follow_failure(rule) AND coalesce(rule, '') <> 'all_skipped' AND failed + not_run > 0
            THEN 'fail'
        WHEN unmet > 0 THEN NULL
        -- All have ended.
        WHEN rule IS NULL THEN CASE WHEN cascaded > 0 THEN 'skip' ELSE 'run' END
        WHEN rule = 'all_success' THEN CASE WHEN skipped + cascaded > 0 THEN 'skip' ELSE 'run' END
        WHEN rule = 'none_failed_min_one_success'
            THEN CASE WHEN upstream > skipped + cascaded THEN 'run' ELSE 'skip' END
        WHEN rule = 'one_success' THEN CASE WHEN failed + not_run > 0 THEN 'fail' ELSE 'skip' END
        WHEN rule IN ('one_failed', 'one_done') THEN 'skip'
        WHEN rule = 'all_done_min_one_success' THEN CASE WHEN upstream > failed + not_run THEN 'run' ELSE 'fail' END
        WHEN rule = 'all_done_setup_success'
            THEN CASE WHEN setups = 0 OR setups_ok > 0 THEN 'run' WHEN setups_skipped >= setups THEN 'skip'
                      ELSE 'fail' END
        ELSE 'run' -- none_failed, all_done, all_failed, all_skipped, none_skipped
    END
$$;

COMMENT ON FUNCTION pgflow.decide_step(text, int, int, int, int, int, int, int, int, int) IS
    'What a rule says: run, skip, fail (not to be run), or NULL while it is undecided. Depends on how the upstream steps '
    'ended, never on the order in which they did.';


CREATE OR REPLACE FUNCTION pgflow.is_condition_met(
    run pgflow.runs, step_slug text, in_degree int, required jsonb, forbidden jsonb
) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    input jsonb := run.payload;
BEGIN
    IF in_degree > 0 THEN
        SELECT jsonb_build_object('payload', run.payload) || coalesce(jsonb_object_agg(
                   CASE u.step_slug WHEN 'payload' THEN 'payload_' ELSE u.step_slug END, u.step_result), '{}')
        INTO input
        FROM pgflow.definition_deps d
        CROSS JOIN LATERAL (
            SELECT s.step_slug, s.step_result FROM pgflow.step_states s
            WHERE s.run_id = run.id AND s.step_slug = d.from_step_slug AND s.status = 'completed'
              AND s.skip_reason IS NULL OFFSET 0) u -- as in closes_cycle
        WHERE d.definition_id = run.definition_id AND d.to_step_slug = is_condition_met.step_slug;
    END IF;
    RETURN (required IS NULL OR input @> required) AND (forbidden IS NULL OR NOT input @> forbidden);
END
$$;

COMMENT ON FUNCTION pgflow.is_condition_met(pgflow.runs, text, int, jsonb, jsonb) IS
    'Whether a step''s input contains its required pattern, and not its forbidden one. The input is the payload where the '
    'step waits for none; else {"payload": ..., "<upstream step>": its result, ...}, without those that have none.';


DO $maps$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_proc
               WHERE oid = to_regprocedure('pgflow.describe_decided(pgflow.runs, text[], text[])')
                 AND 'is_child' <> ALL (proargnames)) THEN
        DROP FUNCTION pgflow.describe_decided(pgflow.runs, text[], text[]); -- what it returns can't be changed in place
    END IF;
END
$maps$;

CREATE OR REPLACE FUNCTION pgflow.describe_decided(run pgflow.runs, due text[], verdicts text[])
RETURNS TABLE (slug text, status text, skip_reason text, skip_cascades boolean, error_message text, attempts int,
               step_result jsonb, is_map boolean, is_child boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.slug,
               CASE WHEN d.verdict = 'run' THEN 'pending'
                    WHEN d.verdict IN ('fail', 'unmet-fail') OR d.verdict LIKE 'unmappable:%' THEN 'failed'
                    ELSE 'completed' END,
               CASE WHEN d.verdict IN ('run', 'empty-complete') THEN NULL
                    WHEN d.verdict = 'fail' THEN 'dependency_failed'
                    WHEN d.verdict LIKE 'unmet-%' THEN 'condition_unmet'
                    WHEN d.verdict LIKE 'unmappable:%' THEN 'not_mappable'
                    WHEN d.verdict LIKE 'empty-%' THEN 'no_items'
                    WHEN d.rule IN ('one_failed', 'one_done', 'all_failed', 'all_skipped') THEN 'rule_unmet'
                    ELSE 'dependency_skipped' END,
               CASE WHEN d.verdict IN ('skip', 'unmet-skip-cascade', 'empty-skip-cascade') THEN true
                    WHEN d.verdict IN ('unmet-skip', 'empty-skip') THEN false END,
               CASE WHEN d.verdict = 'fail' THEN 'not run: a step that it waits for has failed'
                    WHEN d.verdict = 'unmet-fail' THEN 'Condition not met'
                    WHEN d.verdict LIKE 'unmappable:%' THEN substr(d.verdict, 12) END,
               coalesce(d.attempts, 0),
               CASE d.verdict WHEN 'empty-complete' THEN '[]'::jsonb END,
               d.step_type = 'map', d.child_workflow IS NOT NULL
        FROM (SELECT s.slug, s.rule, s.step_type, s.child_workflow, u.attempts,
                     CASE WHEN v.verdict = 'run'
                               AND (s.required_input_pattern IS NOT NULL OR s.forbidden_input_pattern IS NOT NULL)
                               AND NOT pgflow.is_condition_met(run, s.slug, s.in_degree, s.required_input_pattern,
                                                               s.forbidden_input_pattern)
                          THEN 'unmet-' || s.when_unmet
                          WHEN v.verdict = 'run' AND s.step_type = 'map'
                          THEN pgflow.judge_map(run, s.slug, s.map_over, s.map_path, s.max_items, s.when_empty)
                          ELSE v.verdict END AS verdict
              FROM unnest(describe_decided.due, describe_decided.verdicts) AS v (slug, verdict)
              CROSS JOIN LATERAL (
                  SELECT t.slug, t.rule, t.in_degree, t.when_unmet, t.required_input_pattern, t.forbidden_input_pattern,
                         t.step_type, t.map_over, t.map_path, t.max_items, t.when_empty, t.child_workflow
                  FROM pgflow.definition_steps t
                  WHERE t.definition_id = run.definition_id AND t.slug = v.slug OFFSET 0) s
              LEFT JOIN LATERAL (
                  SELECT t.attempts FROM pgflow.undone_steps t
                  WHERE t.run_id = run.id AND t.step_slug = v.slug OFFSET 0) u ON true
              OFFSET 0) d;
END
$$;

COMMENT ON FUNCTION pgflow.describe_decided(pgflow.runs, text[], text[]) IS
    'The rows of step_states that follow from these verdicts of decide_step, once conditions were looked at. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_dropped(run_id uuid, slugs text[]) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    missing text;
BEGIN
    FOREACH missing IN ARRAY slugs LOOP
        PERFORM FROM pgflow.step_states s WHERE s.run_id = find_dropped.run_id AND s.step_slug = missing;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'the row of step "%" of run % was not stored: a trigger or rule on pgflow.step_states skipped it',
                            missing, run_id
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.find_dropped(uuid, text[]) IS
    'Raises 09000 where one of these steps has no row, though an INSERT has just tried. Internal.';


DO $children$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_proc
               WHERE oid = to_regprocedure('pgflow.insert_decided(pgflow.runs, text[], text[])')
                 AND 'children' <> ALL (proargnames)) THEN
        DROP FUNCTION pgflow.insert_decided(pgflow.runs, text[], text[]); -- what it returns can't be changed in place
    END IF;
END
$children$;

CREATE OR REPLACE FUNCTION pgflow.insert_decided(
    run pgflow.runs, due text[], verdicts text[], OUT ended text[], OUT outcomes text[], OUT children text[]
)
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    written bigint;
    maps pg_catalog.text[];
    started pg_catalog.text[];
    map pg_catalog.text;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    WITH described AS MATERIALIZED (
        SELECT * FROM pgflow.describe_decided(run, due, verdicts)
    ), inserted AS (
        INSERT INTO pgflow.step_states AS s (workflow_slug, run_id, step_slug, status, skip_reason, skip_cascades,
                                             error_message, finished_at, attempts, step_result)
        SELECT run.workflow_slug, run.id, d.slug, d.status, d.skip_reason, d.skip_cascades, d.error_message,
               CASE WHEN d.status OPERATOR(pg_catalog.<>) 'pending' THEN pg_catalog.clock_timestamp() END, d.attempts,
               d.step_result
        FROM described d
        ON CONFLICT (run_id, step_slug) DO NOTHING -- started or skipped by hand, or not taken as a branch
        RETURNING s.step_slug, s.status, s.skip_reason, s.skip_cascades
    )
    SELECT pg_catalog.count(*),
           coalesce(pg_catalog.array_agg(i.step_slug) FILTER (WHERE i.status OPERATOR(pg_catalog.<>) 'pending'), '{}'),
           coalesce(pg_catalog.array_agg(pgflow.outcome_of(i.status, i.skip_reason, i.skip_cascades))
                    FILTER (WHERE i.status OPERATOR(pg_catalog.<>) 'pending'), '{}'),
           (SELECT coalesce(pg_catalog.array_agg(d.slug), '{}') FROM described d
            WHERE d.is_map AND d.status OPERATOR(pg_catalog.=) 'pending'),
           (SELECT coalesce(pg_catalog.array_agg(d.slug), '{}') FROM described d
            WHERE d.is_child AND d.status OPERATOR(pg_catalog.=) 'pending'),
           coalesce(pg_catalog.array_agg(i.step_slug) FILTER (WHERE i.status OPERATOR(pg_catalog.=) 'pending'), '{}')
    INTO written, ended, outcomes, maps, children, started
    FROM inserted i;
    FOREACH map IN ARRAY maps LOOP
        PERFORM pgflow.make_items(run, map);
    END LOOP;
    IF written OPERATOR(pg_catalog.<) pg_catalog.cardinality(due) THEN
        PERFORM pgflow.find_dropped(run.id, due);
        -- A step that was pending before, as its rule does not wait for all above it, has its child already.
        children := ARRAY(SELECT pg_catalog.unnest(children) INTERSECT SELECT pg_catalog.unnest(started) ORDER BY 1);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.insert_decided(pgflow.runs, text[], text[]) IS
    'Writes the rows of describe_decided, and returns which of these steps have ended by that, and how; and which of the others '
    'are runs of other workflows, and are to be begun once all is counted. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_edges(definition_id bigint, ended text[], outcomes text[])
RETURNS TABLE (slug text, upstream int, ends int, skipped int, cascaded int, failed int, not_run int, setups_ok int,
               setups_skipped int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.to_step_slug, d.to_in_degree, count(*)::int,
               (count(*) FILTER (WHERE e.outcome = 'skip'))::int,
               (count(*) FILTER (WHERE e.outcome = 'skip-cascade'))::int,
               (count(*) FILTER (WHERE e.outcome = 'failed'))::int,
               (count(*) FILTER (WHERE e.outcome = 'not_run'))::int,
               (count(*) FILTER (WHERE d.from_is_setup AND e.outcome = 'success'))::int,
               (count(*) FILTER (WHERE d.from_is_setup AND e.outcome IN ('skip', 'skip-cascade')))::int
        FROM unnest(count_edges.ended, count_edges.outcomes) AS e (slug, outcome)
        CROSS JOIN LATERAL (
            SELECT t.to_step_slug, t.to_in_degree, t.from_is_setup FROM pgflow.definition_deps t
            WHERE t.definition_id = count_edges.definition_id AND t.from_step_slug = e.slug OFFSET 0) d
        GROUP BY d.to_step_slug, d.to_in_degree;
END
$$;

COMMENT ON FUNCTION pgflow.count_edges(bigint, text[], text[]) IS
    'The steps below these that have ended, and how many of their upstream steps ended how just now. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_ends(
    run pgflow.runs, ended text[], outcomes text[], OUT due text[], OUT verdicts text[]
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    early text[]; -- decided before all of their upstream steps have ended
    over text[];  -- all of theirs have ended
    counted_step text;
BEGIN
    -- Counted, not looked at, as in complete_step; all that have ended at once, in one statement.
    WITH edge AS MATERIALIZED (
        SELECT * FROM pgflow.count_edges(run.definition_id, ended, outcomes)
    ), counted AS (
        INSERT INTO pgflow.waiting_steps AS w (run_id, step_slug, unmet, upstream, skipped, cascaded, failed, not_run,
                                               setups_ok, setups_skipped)
        SELECT run.id, e.slug, e.upstream - e.ends, e.upstream, e.skipped, e.cascaded, e.failed,
               e.not_run, e.setups_ok, e.setups_skipped
        FROM edge e WHERE e.upstream > 1
        ON CONFLICT (run_id, step_slug) DO UPDATE -- NULL: counted while the run used no rules, and nothing was skipped
        SET unmet = w.unmet - (excluded.upstream - excluded.unmet),
            upstream = excluded.upstream,
            skipped = coalesce(w.skipped, 0) + excluded.skipped,
            cascaded = coalesce(w.cascaded, 0) + excluded.cascaded,
            failed = coalesce(w.failed, 0) + excluded.failed,
            not_run = coalesce(w.not_run, 0) + excluded.not_run,
            setups_ok = coalesce(w.setups_ok, 0) + excluded.setups_ok,
            setups_skipped = coalesce(w.setups_skipped, 0) + excluded.setups_skipped
        RETURNING w.step_slug, w.upstream, w.unmet, w.skipped, w.cascaded, w.failed, w.not_run, w.setups_ok,
                  w.setups_skipped, coalesce(w.decided, false) AS decided
    ), known AS (
        SELECT * FROM counted
        UNION ALL
        SELECT e.slug, 1, 0, e.skipped, e.cascaded, e.failed, e.not_run, e.setups_ok, e.setups_skipped, false
        FROM edge e WHERE e.upstream = 1
    ), decision AS (
        SELECT k.step_slug, k.upstream, k.unmet,
               CASE WHEN NOT k.decided THEN
                   pgflow.decide_step(s.rule, k.upstream, k.unmet, k.skipped, k.cascaded, k.failed, k.not_run, s.setups,
                                      k.setups_ok, k.setups_skipped) END AS verdict
        FROM known k
        CROSS JOIN LATERAL (
            SELECT t.rule, t.setups FROM pgflow.definition_steps t
            WHERE t.definition_id = run.definition_id
              AND t.slug = k.step_slug OFFSET 0) s -- as in closes_cycle
        OFFSET 0
    )
    SELECT coalesce(array_agg(d.step_slug) FILTER (WHERE d.verdict IS NOT NULL), '{}'),
           coalesce(array_agg(d.verdict) FILTER (WHERE d.verdict IS NOT NULL), '{}'),
           coalesce(array_agg(d.step_slug)
                    FILTER (WHERE d.verdict IS NOT NULL AND d.unmet > 0), '{}'),
           coalesce(array_agg(d.step_slug)
                    FILTER (WHERE d.upstream > 1 AND d.unmet = 0), '{}')
    INTO due, verdicts, early, over
    FROM decision d;
    FOREACH counted_step IN ARRAY early LOOP -- one by one, as in complete_step
        UPDATE pgflow.waiting_steps w SET decided = true
        WHERE w.run_id = run.id AND w.step_slug = counted_step;
    END LOOP;
    FOREACH counted_step IN ARRAY over LOOP
        DELETE FROM pgflow.waiting_steps w
        WHERE w.run_id = run.id AND w.step_slug = counted_step;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.count_ends(pgflow.runs, text[], text[]) IS
    'Counts these ends for the steps below, and returns those of them that are decided now, with the verdicts. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_down(run pgflow.runs, ends int) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    counted pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    UPDATE pgflow.runs r SET remaining = r.remaining OPERATOR(pg_catalog.-) ends
    WHERE r.id OPERATOR(pg_catalog.=) run.id RETURNING r.* INTO counted;
    IF (counted.remaining OPERATOR(pg_catalog.=) (run.remaining OPERATOR(pg_catalog.-) ends)) IS NOT TRUE THEN
        RAISE EXCEPTION 'run % did not count the end of a step: a trigger or rule on pgflow.runs skipped it', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    RETURN counted;
END
$$;

COMMENT ON FUNCTION pgflow.count_down(pgflow.runs, int) IS 'Counts so many ends of steps for a locked run. Internal.';


CREATE OR REPLACE FUNCTION pgflow.settle(
    run pgflow.runs, ended text[], outcomes text[], due text[] DEFAULT '{}', verdicts text[] DEFAULT '{}'
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    ends int := pg_catalog.cardinality(ended); -- not counted in `remaining` yet
    decided pg_catalog.record;
    children pg_catalog.text[] := '{}';
BEGIN
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN -- a claimed step of a run that has ended: reopen_run counts anew
        RETURN pgflow.count_down(run, ends);
    END IF;
    LOOP
        IF pg_catalog.cardinality(due) OPERATOR(pg_catalog.>) 0 THEN
            SELECT * INTO decided FROM pgflow.insert_decided(run, due, verdicts);
            ended := ended OPERATOR(pg_catalog.||) decided.ended;
            outcomes := outcomes OPERATOR(pg_catalog.||) decided.outcomes;
            ends := ends OPERATOR(pg_catalog.+) pg_catalog.cardinality(decided.ended);
            children := children OPERATOR(pg_catalog.||) decided.children;
            IF NOT run.continues AND 'failed' OPERATOR(pg_catalog.=) ANY (decided.outcomes) THEN
                run := pgflow.count_down(run, ends OPERATOR(pg_catalog.-) pg_catalog.cardinality(
                    pg_catalog.array_positions(decided.outcomes, 'failed')));
                RETURN pgflow.end_run(run, pgflow.find_failure(run.id, run.definition_id, false));
            END IF;
        END IF;
        EXIT WHEN pg_catalog.cardinality(ended) OPERATOR(pg_catalog.=) 0;
        SELECT c.due, c.verdicts INTO due, verdicts FROM pgflow.count_ends(run, ended, outcomes) c;
        EXIT WHEN pg_catalog.cardinality(due) OPERATOR(pg_catalog.=) 0;
        ended := '{}';
        outcomes := '{}';
    END LOOP;
    run := pgflow.count_down(run, ends);
    IF run.remaining OPERATOR(pg_catalog.=) 0 THEN
        RETURN pgflow.conclude_run(run);
    ELSIF pg_catalog.cardinality(children) OPERATOR(pg_catalog.>) 0 THEN
        -- Only now: a child may end at once, and with it its step.
        RETURN pgflow.begin_children(run, children);
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.settle(pgflow.runs, text[], text[], text[], text[]) IS
    'Decides all that follows from these ends of steps of a locked run, or from these verdicts, wave by wave: what starts, '
    'what is skipped, what can''t run any more, and the run''s end. Costs as much as those steps have deps. Internal.';


CREATE OR REPLACE FUNCTION pgflow.begin_by_rules(run pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    first_steps pg_catalog.text[];
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    SELECT pg_catalog.array_agg(s.slug) INTO first_steps FROM pgflow.definition_steps s
    WHERE s.definition_id OPERATOR(pg_catalog.=) run.definition_id
      AND (s.in_degree OPERATOR(pg_catalog.=) 0 OR s.rule OPERATOR(pg_catalog.=) 'always');
    RETURN pgflow.settle(run, '{}', '{}', first_steps, pg_catalog.array_fill(
        'run'::pg_catalog.text, ARRAY[pg_catalog.cardinality(first_steps)]));
END
$$;

COMMENT ON FUNCTION pgflow.begin_by_rules(pgflow.runs) IS
    'Decides the steps of a new run that wait for none. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_failure(run_id uuid, definition_id bigint, only_deciding boolean) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET enable_hashjoin = on SET enable_mergejoin = on SET enable_seqscan = on
SET enable_bitmapscan = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF only_deciding AND NOT EXISTS (
        SELECT FROM pgflow.step_states s
        JOIN pgflow.definition_steps d ON d.definition_id = find_failure.definition_id AND d.slug = s.step_slug
        WHERE s.run_id = find_failure.run_id AND s.status = 'failed' AND d.decides) THEN
        RETURN NULL;
    END IF;
    RETURN coalesce(
        (SELECT format('step "%s" failed: %s', s.step_slug, coalesce(s.error_message, 'no reason given'))
         FROM pgflow.step_states s
         WHERE s.run_id = find_failure.run_id AND s.status = 'failed'
           AND s.skip_reason IS DISTINCT FROM 'dependency_failed'
         ORDER BY s.finished_at, s.step_slug LIMIT 1), 'a step was not run');
END
$$;

COMMENT ON FUNCTION pgflow.find_failure(uuid, bigint, boolean) IS
    'The first failure of a run, as its error message; only_deciding: NULL unless a step has failed that fails the run. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow.conclude_run(run pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    reason CONSTANT pg_catalog.text := pgflow.find_failure(run.id, run.definition_id, true);
    ended pgflow.runs;
BEGIN
    IF reason IS NOT NULL THEN
        RETURN pgflow.end_run(run, reason);
    END IF;
    UPDATE pgflow.runs r SET status = 'completed', finished_at = pg_catalog.clock_timestamp()
    WHERE r.id OPERATOR(pg_catalog.=) run.id RETURNING r.* INTO ended;
    IF (ended.status OPERATOR(pg_catalog.=) 'completed') IS NOT TRUE THEN
        RAISE EXCEPTION 'the completion of run % was not stored: a trigger or rule on pgflow.runs skipped it', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    PERFORM pgflow.announce_run(ended);
    IF ended.backfill_id IS NOT NULL THEN
        PERFORM pgflow.continue_backfills(ended.id);
    END IF;
    IF ended.parent_run_id IS NOT NULL THEN
        PERFORM pgflow.report_to_parent(ended);
    END IF;
    RETURN ended;
END
$$;

COMMENT ON FUNCTION pgflow.conclude_run(pgflow.runs) IS
    'Ends a locked run all of whose steps have ended: failed, where a step has failed that decides. Internal.';


CREATE OR REPLACE FUNCTION pgflow.start_by_rules(run pgflow.runs, step_slug text) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    verdicts CONSTANT pg_catalog.text[] := ARRAY(
        SELECT c.verdict FROM pgflow.count_steps(run.id, run.definition_id, ARRAY[start_by_rules.step_slug]) c);
    state pgflow.step_states;
BEGIN
    IF verdicts[1] IS NULL THEN
        RAISE EXCEPTION 'step "%" of run % can''t start: its rule waits for the end of another step', step_slug, run.id
            USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    PERFORM pgflow.settle(run, '{}', '{}', ARRAY[start_by_rules.step_slug], verdicts);
    UPDATE pgflow.waiting_steps w SET decided = true
    WHERE w.run_id OPERATOR(pg_catalog.=) run.id AND w.step_slug OPERATOR(pg_catalog.=) start_by_rules.step_slug;
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) start_by_rules.step_slug;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.start_by_rules(pgflow.runs, text) IS
    'What start_step does in a locked run that uses rules: 55000 while the rule is undecided. Internal.';


CREATE OR REPLACE FUNCTION pgflow.use_rules(run pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    switched pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    IF run.uses_rules THEN
        RETURN run;
    END IF;
    -- Its counters so far are right: nothing was skipped.
    UPDATE pgflow.runs r SET uses_rules = true WHERE r.id OPERATOR(pg_catalog.=) run.id RETURNING r.* INTO switched;
    IF switched.uses_rules IS NOT TRUE THEN
        RAISE EXCEPTION 'a step of run % can''t be skipped: a trigger or rule on pgflow.runs skipped the update', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    RETURN switched;
END
$$;

COMMENT ON FUNCTION pgflow.use_rules(pgflow.runs) IS
    'Has the further steps of a locked run decided by rules, as something of it is skipped. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_when_exhausted(definition_id bigint, step_slug text) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    SELECT d.when_exhausted FROM pgflow.definition_steps d
    WHERE d.definition_id = find_when_exhausted.definition_id AND d.slug = find_when_exhausted.step_slug
$$;

COMMENT ON FUNCTION pgflow.find_when_exhausted(bigint, text) IS
    'What becomes of a step whose last attempt has failed: fail, skip, skip-cascade. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_refused(
    run pgflow.runs, step_slug text, epoch int, attempt int, doing text
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    state CONSTANT pgflow.step_states := pgflow.unaccepted_state(run, step_slug, doing);
BEGIN
    IF state.status = 'pending'
       AND (epoch IS NULL OR epoch = run.epoch)
       AND (attempt IS NULL OR (attempt = state.attempts AND state.started_at IS NOT NULL)) THEN
        RAISE EXCEPTION 'that step "%" of run % is % was not stored: a trigger or rule on pgflow.step_states skipped it',
                        step_slug, run.id, doing
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.find_refused(pgflow.runs, text, int, int, text) IS
    'The state of a step whose report was not accepted; 09000 where it would have been, but for a trigger. Internal.';


CREATE OR REPLACE FUNCTION pgflow.fail_by_rules(
    run pgflow.runs, step_slug text, error_message text, epoch int, attempt int
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    outcome CONSTANT pg_catalog.text := coalesce(
        pg_catalog."replace"(pgflow.find_when_exhausted(run.definition_id, step_slug), 'fail', 'failed'), 'failed');
    fails CONSTANT boolean := outcome OPERATOR(pg_catalog.=) 'failed';
    state pgflow.step_states;
BEGIN
    UPDATE pgflow.step_states s
    SET status = CASE WHEN fails THEN 'failed' ELSE 'completed' END, ended_as = NULL,
        skip_reason = CASE WHEN NOT fails THEN 'handler_failed' END,
        skip_cascades = CASE WHEN NOT fails THEN outcome OPERATOR(pg_catalog.=) 'skip-cascade' END,
        error_message = fail_by_rules.error_message, finished_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) fail_by_rules.step_slug
      AND s.status OPERATOR(pg_catalog.=) 'pending'
      AND (fail_by_rules.epoch IS NULL OR fail_by_rules.epoch OPERATOR(pg_catalog.=) run.epoch)
      AND (fail_by_rules.attempt IS NULL OR (fail_by_rules.attempt OPERATOR(pg_catalog.=) s.attempts
        AND s.started_at IS NOT NULL))
    RETURNING s.* INTO state;
    IF NOT FOUND THEN
        RETURN pgflow.find_refused(run, step_slug, epoch, attempt, 'failed');
    END IF;
    IF fails AND NOT run.continues THEN
        PERFORM pgflow.end_run(run, pg_catalog.format('step "%s" failed: %s', step_slug,
                                                      coalesce(error_message, 'no reason given')));
    ELSE
        PERFORM pgflow.settle(run, ARRAY[fail_by_rules.step_slug], ARRAY[outcome]);
    END IF;
    PERFORM pgflow.leave_children(run.id, fail_by_rules.step_slug, false); -- a time-out, say. Items under way may end
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.fail_by_rules(pgflow.runs, text, text, int, int) IS
    'What fail_step does in a locked run that uses rules. Internal.';


CREATE OR REPLACE FUNCTION pgflow.skip_step(
    run_id uuid, step_slug text, note text DEFAULT NULL, cascade boolean DEFAULT true, epoch int DEFAULT NULL,
    attempt int DEFAULT NULL
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
    hard CONSTANT boolean := coalesce(skip_step."cascade", true);
BEGIN
    UPDATE pgflow.step_states s
    SET status = 'completed', skip_reason = 'requested', skip_cascades = hard,
        skip_note = pg_catalog."left"(skip_step.note, 10000), finished_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) skip_step.step_slug
      AND s.status OPERATOR(pg_catalog.=) 'pending'
      AND (skip_step.epoch IS NULL OR skip_step.epoch OPERATOR(pg_catalog.=) run.epoch)
      AND (skip_step.attempt IS NULL OR (skip_step.attempt OPERATOR(pg_catalog.=) s.attempts
        AND s.started_at IS NOT NULL))
    RETURNING s.* INTO state;
    IF NOT FOUND THEN
        SELECT * INTO state FROM pgflow.step_states s
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) skip_step.step_slug;
        IF FOUND OR run.status OPERATOR(pg_catalog.<>) 'pending' OR skip_step.attempt IS NOT NULL
           OR coalesce(skip_step.epoch OPERATOR(pg_catalog.<>) run.epoch, false) THEN
            RETURN pgflow.find_refused(run, step_slug, epoch, attempt, 'skipped');
        END IF;
        PERFORM pgflow.check_step(run.workflow_slug, run.definition_id, step_slug);
        INSERT INTO pgflow.step_states AS s (workflow_slug, run_id, step_slug, status, skip_reason, skip_cascades,
                                             skip_note, finished_at)
        VALUES (run.workflow_slug, run.id, skip_step.step_slug, 'completed', 'requested', hard,
                pg_catalog."left"(skip_step.note, 10000), pg_catalog.clock_timestamp())
        RETURNING s.* INTO state;
    END IF;
    IF (state.skip_reason OPERATOR(pg_catalog.=) 'requested') IS NOT TRUE THEN
        RAISE EXCEPTION 'the skip of step "%" of run % was not stored: a trigger or rule on pgflow.step_states skipped it',
                        step_slug, run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    PERFORM pgflow.settle(pgflow.use_rules(run), ARRAY[skip_step.step_slug],
                          ARRAY[CASE WHEN hard THEN 'skip-cascade' ELSE 'skip' END]);
    IF run.uses_rules THEN
        PERFORM pgflow.leave_children(run.id, skip_step.step_slug);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.skip_step(uuid, text, text, boolean, int, int) IS
    'Skips a step that is pending, or not even started: with what is below it and has no rule of its own (cascade), or '
    'without. The note is for people. The first report wins: of a step that has ended, its state as it is.';


CREATE OR REPLACE FUNCTION pgflow.find_not_taken(
    definition_id bigint, step_slug text, taken text[], whole boolean
) RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    unknown text;
BEGIN
    SELECT coalesce(t.slug, 'NULL') INTO unknown FROM unnest(taken) AS t (slug)
    WHERE NOT EXISTS (SELECT FROM pgflow.definition_deps d
                      WHERE d.definition_id = find_not_taken.definition_id
                        AND d.from_step_slug = find_not_taken.step_slug AND d.to_step_slug = t.slug)
    LIMIT 1;
    IF FOUND OR taken IS NULL THEN
        RAISE EXCEPTION 'step "%" can''t take the branch "%": no such step waits for it', step_slug,
                        coalesce(unknown, 'NULL')
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'Name steps that wait for this one directly; an empty array takes none.';
    END IF;
    RETURN coalesce((
        WITH RECURSIVE kept (slug) AS ( -- what a taken branch leads to belongs to no branch that is not taken
            SELECT t.slug FROM unnest(taken) AS t (slug)
            UNION
            SELECT d.to_step_slug FROM kept k CROSS JOIN LATERAL (
                SELECT e.to_step_slug FROM pgflow.definition_deps e
                WHERE e.definition_id = find_not_taken.definition_id AND e.from_step_slug = k.slug OFFSET 0) d
        ), below (slug) AS (
            SELECT d.to_step_slug FROM pgflow.definition_deps d
            WHERE d.definition_id = find_not_taken.definition_id AND d.from_step_slug = find_not_taken.step_slug
            UNION
            SELECT d.to_step_slug FROM below b CROSS JOIN LATERAL (
                SELECT e.to_step_slug FROM pgflow.definition_deps e
                WHERE whole AND e.definition_id = find_not_taken.definition_id AND e.from_step_slug = b.slug OFFSET 0) d
        )
        SELECT array_agg(left_out.slug) FROM (SELECT slug FROM below EXCEPT SELECT slug FROM kept) left_out), '{}');
END
$$;

COMMENT ON FUNCTION pgflow.find_not_taken(bigint, text, text[], boolean) IS
    'The steps that are skipped where a step takes these branches; 22023 where one of them does not wait for it. Internal.';


CREATE OR REPLACE FUNCTION pgflow.take_branches(
    run_id uuid, step_slug text, taken text[], step_result jsonb DEFAULT 'null', whole boolean DEFAULT false,
    epoch int DEFAULT NULL, attempt int DEFAULT NULL
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
    left_out CONSTANT pg_catalog.text[] := pgflow.find_not_taken(run.definition_id, step_slug, taken,
                                                                 coalesce(whole, false));
    skipped pg_catalog.text[];
BEGIN
    UPDATE pgflow.step_states s
    SET status = 'completed', step_result = take_branches.step_result, finished_at = pg_catalog.clock_timestamp()
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) take_branches.step_slug
      AND s.status OPERATOR(pg_catalog.=) 'pending'
      AND (take_branches.epoch IS NULL OR take_branches.epoch OPERATOR(pg_catalog.=) run.epoch)
      AND (take_branches.attempt IS NULL OR (take_branches.attempt OPERATOR(pg_catalog.=) s.attempts
        AND s.started_at IS NOT NULL))
    RETURNING s.* INTO state;
    IF NOT FOUND THEN
        RETURN pgflow.find_refused(run, step_slug, epoch, attempt, 'completed');
    END IF;
    WITH inserted AS (
        INSERT INTO pgflow.step_states AS s (workflow_slug, run_id, step_slug, status, skip_reason, skip_cascades,
                                             skipped_by, finished_at)
        SELECT run.workflow_slug, run.id, l.slug, 'completed', 'branch_not_taken', true, take_branches.step_slug,
               pg_catalog.clock_timestamp()
        FROM pg_catalog.unnest(left_out) AS l (slug)
        WHERE run.status OPERATOR(pg_catalog.=) 'pending'
        ON CONFLICT (run_id, step_slug) DO NOTHING -- started or decided before
        RETURNING s.step_slug
    )
    SELECT coalesce(pg_catalog.array_agg(i.step_slug), '{}') INTO skipped FROM inserted i;
    IF run.status OPERATOR(pg_catalog.=) 'pending' AND pg_catalog.cardinality(skipped)
       OPERATOR(pg_catalog.<) pg_catalog.cardinality(left_out) THEN
        PERFORM pgflow.find_dropped(run.id, left_out);
    END IF;
    PERFORM pgflow.settle(pgflow.use_rules(run), ARRAY[take_branches.step_slug] OPERATOR(pg_catalog.||) skipped,
                          ARRAY['success'::pg_catalog.text] OPERATOR(pg_catalog.||) pg_catalog.array_fill(
                              'skip-cascade'::pg_catalog.text, ARRAY[pg_catalog.cardinality(skipped)]));
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow.take_branches(uuid, text, text[], jsonb, boolean, int, int) IS
    'Completes a step, and skips the steps that wait for it and are not taken, whatever their rules say; whole: all that '
    'is below them, too. What a taken step leads to is not skipped. 22023 where a taken step does not wait for it.';


CREATE OR REPLACE FUNCTION pgflow.count_steps(run_id uuid, definition_id bigint, slugs text[])
RETURNS TABLE (slug text, verdict text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.slug,
               pgflow.decide_step(s.rule, s.in_degree, c.unmet, c.skipped, c.cascaded, c.failed, c.not_run, s.setups,
                                  c.setups_ok, c.setups_skipped)
        FROM unnest(count_steps.slugs) AS g (slug)
        CROSS JOIN LATERAL (
            SELECT t.slug, t.rule, t.in_degree, t.setups FROM pgflow.definition_steps t
            WHERE t.definition_id = count_steps.definition_id AND t.slug = g.slug OFFSET 0) s
        CROSS JOIN LATERAL (
            SELECT (count(*) FILTER (WHERE u.outcome IS NULL))::int AS unmet,
                   (count(*) FILTER (WHERE u.outcome = 'skip'))::int AS skipped,
                   (count(*) FILTER (WHERE u.outcome = 'skip-cascade'))::int AS cascaded,
                   (count(*) FILTER (WHERE u.outcome = 'failed'))::int AS failed,
                   (count(*) FILTER (WHERE u.outcome = 'not_run'))::int AS not_run,
                   (count(*) FILTER (WHERE e.from_is_setup AND u.outcome = 'success'))::int AS setups_ok,
                   (count(*) FILTER (WHERE e.from_is_setup AND u.outcome IN ('skip', 'skip-cascade')))::int
                       AS setups_skipped
            FROM pgflow.definition_deps e
            LEFT JOIN LATERAL (
                SELECT pgflow.outcome_of(t.status, t.skip_reason, t.skip_cascades) AS outcome
                FROM pgflow.step_states t
                WHERE t.run_id = count_steps.run_id AND t.step_slug = e.from_step_slug OFFSET 0) u ON true
            WHERE e.definition_id = count_steps.definition_id AND e.to_step_slug = s.slug OFFSET 0) c;
END
$$;

COMMENT ON FUNCTION pgflow.count_steps(uuid, bigint, text[]) IS
    'What the rules of these steps say now. Costs as much as they have upstream steps. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_upstream(run_id uuid, definition_id bigint)
RETURNS TABLE (slug text, verdict text, upstream int, unmet int, skipped int, cascaded int, failed int, not_run int,
               setups_ok int, setups_skipped int, has_state boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET enable_hashjoin = on SET enable_mergejoin = on SET enable_seqscan = on
SET enable_bitmapscan = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT s.slug,
               pgflow.decide_step(s.rule, s.in_degree, c.unmet, c.skipped, c.cascaded, c.failed, c.not_run, s.setups,
                                  c.setups_ok, c.setups_skipped),
               s.in_degree, c.unmet, c.skipped, c.cascaded, c.failed, c.not_run, c.setups_ok, c.setups_skipped,
               t.step_slug IS NOT NULL
        FROM (
            SELECT d.slug, (count(e.from_step_slug) FILTER (WHERE u.outcome IS NULL))::int AS unmet,
                   (count(*) FILTER (WHERE u.outcome = 'skip'))::int AS skipped,
                   (count(*) FILTER (WHERE u.outcome = 'skip-cascade'))::int AS cascaded,
                   (count(*) FILTER (WHERE u.outcome = 'failed'))::int AS failed,
                   (count(*) FILTER (WHERE u.outcome = 'not_run'))::int AS not_run,
                   (count(*) FILTER (WHERE e.from_is_setup AND u.outcome = 'success'))::int AS setups_ok,
                   (count(*) FILTER (WHERE e.from_is_setup AND u.outcome IN ('skip', 'skip-cascade')))::int
                       AS setups_skipped
            FROM pgflow.definition_steps d
            LEFT JOIN pgflow.definition_deps e ON e.definition_id = count_upstream.definition_id
                                              AND e.to_step_slug = d.slug
            LEFT JOIN (SELECT i.step_slug, pgflow.outcome_of(i.status, i.skip_reason, i.skip_cascades) AS outcome
                       FROM pgflow.step_states i WHERE i.run_id = count_upstream.run_id) u
                   ON u.step_slug = e.from_step_slug
            WHERE d.definition_id = count_upstream.definition_id
            GROUP BY d.slug
        ) c
        JOIN pgflow.definition_steps s ON s.definition_id = count_upstream.definition_id AND s.slug = c.slug
        LEFT JOIN pgflow.step_states t ON t.run_id = count_upstream.run_id AND t.step_slug = c.slug;
END
$$;

COMMENT ON FUNCTION pgflow.count_upstream(uuid, bigint) IS
    'How the upstream steps of every step of a run have ended, and what its rule says to that. Reads all. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_consequences(run_id uuid, definition_id bigint, undone text[]) RETURNS text[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    below text[];
BEGIN
    SELECT array_agg(DISTINCT d.to_step_slug) INTO below
    FROM unnest(undone) AS u (slug)
    CROSS JOIN LATERAL (
        SELECT e.to_step_slug FROM pgflow.definition_deps e
        WHERE e.definition_id = find_consequences.definition_id AND e.from_step_slug = u.slug OFFSET 0) d
    CROSS JOIN LATERAL (
        SELECT FROM pgflow.step_states s
        WHERE s.run_id = find_consequences.run_id AND s.step_slug = d.to_step_slug OFFSET 0) s;
    RETURN (
        SELECT array_agg(c.slug)
        FROM pgflow.count_steps(find_consequences.run_id, find_consequences.definition_id, below) c
        CROSS JOIN LATERAL (
            SELECT s.skip_reason, s.skipped_by FROM pgflow.step_states s
            WHERE s.run_id = find_consequences.run_id AND s.step_slug = c.slug OFFSET 0) t
        WHERE CASE WHEN t.skip_reason = 'branch_not_taken' THEN
                       NOT EXISTS (SELECT FROM pgflow.step_states b
                                   WHERE b.run_id = find_consequences.run_id AND b.step_slug = t.skipped_by
                                     AND b.status = 'completed' OFFSET 0)
                   WHEN t.skip_reason = 'requested' THEN false
                   WHEN t.skip_reason IN ('dependency_skipped', 'rule_unmet') THEN c.verdict IS DISTINCT FROM 'skip'
                   ELSE c.verdict IS DISTINCT FROM 'run' END);
END
$$;

COMMENT ON FUNCTION pgflow.find_consequences(uuid, bigint, text[]) IS
    'The steps below these undecided ones that were decided because of how those had ended; NULL for none. Internal.';


CREATE OR REPLACE FUNCTION pgflow.undo_steps(run pgflow.runs, slugs text[]) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    undone pg_catalog.text;
    executed int;
    of_items int;
    has_children CONSTANT boolean := EXISTS (
        SELECT FROM pgflow.runs r WHERE r.parent_run_id OPERATOR(pg_catalog.=) run.id);
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    FOREACH undone IN ARRAY slugs LOOP -- one by one, as in complete_step
        of_items := pgflow.find_last_attempt(run.id, undone);
        DELETE FROM pgflow.step_states s -- a map's items go with it
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) undone
        RETURNING GREATEST(s.attempts, of_items) INTO executed;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'step "%" of run % was not taken back: a trigger or rule on pgflow.step_states skipped it',
                            undone, run.id
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN OLD.';
        END IF;
        IF has_children THEN
            PERFORM pgflow.leave_children(run.id, undone);
        END IF;
        IF executed OPERATOR(pg_catalog.>) 0 THEN -- the numbers go on: a late report of yesterday stays refused
            INSERT INTO pgflow.undone_steps AS u (run_id, step_slug, attempts)
            VALUES (run.id, undone, executed)
            ON CONFLICT (run_id, step_slug) DO UPDATE SET attempts = excluded.attempts;
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.undo_steps(pgflow.runs, text[]) IS
    'Makes steps of a locked run undecided: their rows go, and the numbers of their attempts are kept. Internal.';


CREATE OR REPLACE FUNCTION pgflow.take_back(run pgflow.runs) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    undone pg_catalog.text[];
    not_executed pg_catalog.text[];
BEGIN
    PERFORM pgflow.reopen_items(run);
    -- What failed is to be executed again. What was not executed is to be decided again.
    SELECT pg_catalog.array_agg(s.step_slug),
           coalesce(pg_catalog.array_agg(s.step_slug) FILTER (WHERE s.skip_reason IS NOT NULL), '{}')
    INTO undone, not_executed
    FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.status OPERATOR(pg_catalog.=) 'failed';
    PERFORM pgflow.undo_steps(run, not_executed);
    UPDATE pgflow.step_states s
    SET status = 'pending', ended_as = NULL, error_message = NULL, started_at = NULL, finished_at = NULL
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.status OPERATOR(pg_catalog.=) 'failed';
    -- What followed from their failure, unless it would follow without it, too.
    WHILE pg_catalog.cardinality(undone) OPERATOR(pg_catalog.>) 0 LOOP
        undone := pgflow.find_consequences(run.id, run.definition_id, undone);
        EXIT WHEN undone IS NULL;
        PERFORM pgflow.undo_steps(run, undone);
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.take_back(pgflow.runs) IS
    'Of a locked run that is being reopened: failed steps are pending again, and what was decided because of them is '
    'undecided. Internal.';


CREATE OR REPLACE FUNCTION pgflow.recompute_rules(run pgflow.runs, definition pgflow.definitions) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    ended int;
    failed pg_catalog.text;
    counted pgflow.runs;
    due pg_catalog.text[];
    verdicts pg_catalog.text[];
BEGIN
    SELECT c.completed OPERATOR(pg_catalog.+) CASE WHEN definition.continues THEN c.failures ELSE 0 END, c.failed
    INTO ended, failed FROM pgflow.count_states(run.id, definition.id) c;
    UPDATE pgflow.runs r
    SET definition_id = definition.id, remaining = definition.step_count OPERATOR(pg_catalog.-) ended,
        uses_rules = true, continues = definition.continues
    WHERE r.id OPERATOR(pg_catalog.=) run.id
    RETURNING r.* INTO counted;
    IF (counted.definition_id OPERATOR(pg_catalog.=) definition.id AND counted.uses_rules) IS NOT TRUE THEN
        RAISE EXCEPTION 'run % can''t begin: a trigger or rule on pgflow.runs skipped the update', run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    DELETE FROM pgflow.waiting_steps w WHERE w.run_id OPERATOR(pg_catalog.=) run.id;
    WITH upstream AS MATERIALIZED (
        SELECT * FROM pgflow.count_upstream(run.id, definition.id)
    ), counted_steps AS (
        INSERT INTO pgflow.waiting_steps (run_id, step_slug, unmet, upstream, skipped, cascaded, failed, not_run,
                                          setups_ok, setups_skipped, decided)
        SELECT run.id, u.slug, u.unmet, u.upstream, u.skipped, u.cascaded, u.failed, u.not_run, u.setups_ok,
               u.setups_skipped, u.has_state OR u.verdict IS NOT NULL
        FROM upstream u WHERE u.unmet OPERATOR(pg_catalog.>) 0 AND u.unmet OPERATOR(pg_catalog.<) u.upstream
    )
    SELECT coalesce(pg_catalog.array_agg(u.slug), '{}'), coalesce(pg_catalog.array_agg(u.verdict), '{}')
    INTO due, verdicts
    FROM upstream u WHERE NOT u.has_state AND u.verdict IS NOT NULL;
    IF counted.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RETURN counted;
    ELSIF failed IS NOT NULL AND NOT counted.continues THEN
        RETURN pgflow.end_run(counted, failed);
    END IF;
    RETURN pgflow.resume_children(pgflow.resume_maps(pgflow.settle(counted, '{}', '{}', due, verdicts)));
END
$$;

COMMENT ON FUNCTION pgflow.recompute_rules(pgflow.runs, pgflow.definitions) IS
    'recompute_run for a run that uses rules. Internal.';


------------------------------------------------------------------------------------------------------------
-- Maps: a step that is executed once for each item of an array. Only steps of the type `map` come here.
--
-- Its items are rows from the moment that it starts, because reading one element of a stored array costs the whole array
-- each time. They end one by one. The end of the last one ends the step, by complete_step or fail_step. Each of these
-- functions locks the run's row first, as every transition does, and takes as many items as it is given.
--
-- The functions that write step_items and step_maps alone set all that the planner chooses by, as in the section above.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.find_items(run pgflow.runs, map_over text, map_path text[]) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    source record;
BEGIN
    IF map_over IS NULL THEN
        RETURN run.payload #> coalesce(map_path, '{}');
    END IF;
    SELECT s.status, s.skip_reason, s.step_result INTO source FROM pgflow.step_states s
    WHERE s.run_id = run.id AND s.step_slug = find_items.map_over;
    IF NOT FOUND OR source.status <> 'completed' OR source.skip_reason IS NOT NULL THEN
        RETURN '[]'; -- skipped, failed or not there yet, and the map's rule says to run without it
    END IF;
    RETURN source.step_result #> coalesce(map_path, '{}');
END
$$;

COMMENT ON FUNCTION pgflow.find_items(pgflow.runs, text, text[]) IS
    'What a map maps over: an array, or what is there in its place; NULL for nothing. Internal.';


CREATE OR REPLACE FUNCTION pgflow.judge_map(
    run pgflow.runs, step_slug text, map_over text, map_path text[], max_items int, when_empty text
) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    items CONSTANT jsonb := pgflow.find_items(run, map_over, map_path);
    most CONSTANT int := coalesce(max_items, 1000000);
    total int;
BEGIN
    IF items IS NULL OR jsonb_typeof(items) <> 'array' THEN
        RETURN format('unmappable:step "%s" maps over %s%s, which is %s and no array', step_slug,
                      CASE WHEN map_over IS NULL THEN 'the payload' ELSE format('the result of step "%s"', map_over) END,
                      CASE WHEN cardinality(map_path) > 0 THEN format(' at %s', array_to_string(map_path, '.')) END,
                      coalesce(jsonb_typeof(items), 'nothing'));
    END IF;
    total := jsonb_array_length(items);
    IF total = 0 THEN
        RETURN 'empty-' || when_empty;
    ELSIF total > most THEN
        RETURN format('unmappable:step "%s" has %s items, and at most %s are allowed (max_items)', step_slug, total, most);
    END IF;
    RETURN 'run';
END
$$;

COMMENT ON FUNCTION pgflow.judge_map(pgflow.runs, text, text, text[], int, text) IS
    'What becomes of a map whose rule says that it runs: run; empty-complete, empty-skip, empty-skip-cascade; or '
    'unmappable, and why. Internal.';


CREATE OR REPLACE FUNCTION pgflow.make_items(run pgflow.runs, step_slug text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    step record;
    items jsonb;
    total int;
    made bigint;
    former int;
BEGIN
    SELECT s.attempts INTO former FROM pgflow.step_states s
    WHERE s.run_id = run.id AND s.step_slug = make_items.step_slug AND s.status = 'pending'
      AND NOT EXISTS (SELECT FROM pgflow.step_maps m
                      WHERE m.run_id = run.id AND m.step_slug = make_items.step_slug OFFSET 0);
    IF NOT FOUND THEN
        RETURN; -- started or skipped by hand before
    END IF;
    SELECT d.map_over, d.map_path, CASE WHEN d.child_workflow IS NOT NULL THEN coalesce(d.max_children, 100) END AS max_children
    INTO step FROM pgflow.definition_steps d
    WHERE d.definition_id = run.definition_id AND d.slug = make_items.step_slug;
    items := pgflow.find_items(run, step.map_over, step.map_path);
    total := jsonb_array_length(items);
    INSERT INTO pgflow.step_maps (run_id, step_slug, total, remaining, epoch, former_attempts, max_children)
    VALUES (run.id, make_items.step_slug, total, total, run.epoch, former, step.max_children);
    INSERT INTO pgflow.step_items (run_id, step_slug, item_index, item, attempts)
    SELECT run.id, make_items.step_slug, i.place - 1, i.item, former
    FROM jsonb_array_elements(items) WITH ORDINALITY AS i (item, place);
    GET DIAGNOSTICS made = ROW_COUNT;
    IF made < total THEN
        RAISE EXCEPTION 'an item of step "%" of run % was not stored: a trigger or rule on pgflow.step_items skipped it',
                        step_slug, run.id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.make_items(pgflow.runs, text) IS
    'Makes the items of a pending map, in one statement, unless it has them. Internal.';


CREATE OR REPLACE FUNCTION pgflow.list_pending_maps(run_id uuid, definition_id bigint)
RETURNS TABLE (slug text, map_over text, map_path text[], max_items int, when_empty text, has_items boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET enable_hashjoin = on SET enable_mergejoin = on SET enable_seqscan = on
SET enable_bitmapscan = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.slug, d.map_over, d.map_path, d.max_items, d.when_empty, m.run_id IS NOT NULL
        FROM pgflow.definition_steps d
        JOIN pgflow.step_states s ON s.run_id = list_pending_maps.run_id AND s.step_slug = d.slug AND s.status = 'pending'
        LEFT JOIN pgflow.step_maps m ON m.run_id = list_pending_maps.run_id AND m.step_slug = d.slug
        WHERE d.definition_id = list_pending_maps.definition_id AND d.step_type = 'map'
        ORDER BY d.slug;
END
$$;

COMMENT ON FUNCTION pgflow.list_pending_maps(uuid, bigint) IS 'The pending maps of a run. Internal.';


CREATE OR REPLACE FUNCTION pgflow.resume_maps(run pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    pending pg_catalog.record;
    verdict pg_catalog.text;
BEGIN
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RETURN run;
    END IF;
    FOR pending IN SELECT * FROM pgflow.list_pending_maps(run.id, run.definition_id) LOOP
        verdict := 'run';
        IF NOT pending.has_items THEN -- its row was inserted by hand
            verdict := pgflow.judge_map(run, pending.slug, pending.map_over, pending.map_path, pending.max_items,
                                        pending.when_empty);
        END IF;
        IF verdict OPERATOR(pg_catalog.=) 'run' THEN
            PERFORM pgflow.make_items(run, pending.slug);
            PERFORM pgflow.end_map(m) FROM pgflow.step_maps m
            WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) pending.slug;
        ELSIF verdict OPERATOR(pg_catalog.=) 'empty-complete' THEN
            PERFORM pgflow.complete_step(run.id, pending.slug, '[]');
        ELSIF pg_catalog.starts_with(verdict, 'empty-') THEN
            PERFORM pgflow.skip_step(run.id, pending.slug, 'it has no items',
                                     verdict OPERATOR(pg_catalog.=) 'empty-skip-cascade');
        ELSE
            PERFORM pgflow.fail_step(run.id, pending.slug, pg_catalog.substr(verdict, 12));
        END IF;
    END LOOP;
    IF FOUND THEN
        SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) run.id;
    END IF;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.resume_maps(pgflow.runs) IS
    'In a locked run that was counted again: makes the items of pending maps that have none, and ends maps all of whose '
    'items have ended. Internal.';


CREATE OR REPLACE FUNCTION pgflow.lock_map(run_id uuid, step_slug text, epoch int, doing text) RETURNS pgflow.step_maps
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    state pgflow.step_states;
    map pgflow.step_maps;
BEGIN
    IF lock_map.epoch OPERATOR(pg_catalog.<>) run.epoch THEN
        RAISE EXCEPTION 'items of step "%" of run % can''t be % in epoch %: the run is in epoch %',
                        step_slug, run.id, doing, epoch, run.epoch
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_epoch',
                  HINT = 'Another owner has taken the run: stop working on it.';
    END IF;
    SELECT * INTO map FROM pgflow.step_maps m
    WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) lock_map.step_slug;
    IF FOUND THEN
        RETURN map;
    END IF;
    state := pgflow.unaccepted_state(run, step_slug, doing);
    PERFORM FROM pgflow.definition_steps d
    WHERE d.definition_id OPERATOR(pg_catalog.=) run.definition_id
      AND d.slug OPERATOR(pg_catalog.=) lock_map.step_slug AND d.step_type OPERATOR(pg_catalog.=) 'map';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'step "%" of run % has no items: it was no map when the run began', step_slug, run.id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Claim and report it by claim_step, complete_step and fail_step.';
    ELSIF state.status OPERATOR(pg_catalog.=) 'pending' AND run.status OPERATOR(pg_catalog.=) 'pending' THEN
        PERFORM pgflow.resume_maps(run); -- its row was inserted by hand
        SELECT * INTO map FROM pgflow.step_maps m
        WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) lock_map.step_slug;
    END IF;
    RETURN map;
END
$$;

COMMENT ON FUNCTION pgflow.lock_map(uuid, text, int, text) IS
    'Locks a run, and returns one of its maps; NULL where the map has ended without items. 55000 for a step that is no map, '
    'and for a stale epoch. Internal.';


CREATE OR REPLACE FUNCTION pgflow.pick_items(map pgflow.step_maps, wanted int, epoch int, lease interval)
RETURNS TABLE (item_index int, attempt int, item jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    first_fresh CONSTANT int := map.next_item;
    moment CONSTANT timestamptz := clock_timestamp(); -- a volatile call is no condition of an index
    due int[];
    one int;
    step int;
    got int;
    claimed pgflow.step_items;
    stored int;
    skipped_on text; -- the table whose write a trigger or rule has skipped
    missing int := wanted;
BEGIN
    IF epoch > map.epoch THEN -- what a former owner had claimed, without a lease, it does no more
        UPDATE pgflow.step_items i SET due_at = '-infinity', claimed_in = NULL, started_at = NULL
        WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index < map.next_item
          AND i.status = 'pending' AND i.claimed_in < pick_items.epoch;
        skipped_on := CASE WHEN EXISTS (
            SELECT FROM pgflow.step_items i
            WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index < map.next_item
              AND i.status = 'pending' AND i.claimed_in < pick_items.epoch OFFSET 0) THEN 'step_items' END;
        UPDATE pgflow.step_maps m SET epoch = pick_items.epoch
        WHERE m.run_id = map.run_id AND m.step_slug = map.step_slug
        RETURNING m.epoch INTO stored;
        skipped_on := CASE WHEN (stored = epoch) IS NOT TRUE THEN 'step_maps' ELSE skipped_on END;
    END IF;
    due := ARRAY(
        SELECT i.item_index FROM pgflow.step_items i
        WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.due_at <= moment
        ORDER BY i.due_at LIMIT wanted);
    FOREACH one IN ARRAY due LOOP -- one by one, as in complete_step
        IF one >= map.next_item THEN
            -- Failed by hand before any claim. The cursor claims it: what lies beyond is never released as claimed.
            UPDATE pgflow.step_items i SET due_at = NULL
            WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index = one AND i.status = 'pending'
              AND i.attempts = map.former_attempts
            RETURNING i.* INTO claimed;
            CONTINUE WHEN FOUND AND claimed.due_at IS NULL;
        END IF;
        UPDATE pgflow.step_items i
        SET attempts = i.attempts + 1, started_at = moment, due_at = moment + lease,
            claimed_in = CASE WHEN lease IS NULL THEN pick_items.epoch END
        WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index = one AND i.status = 'pending'
        RETURNING i.* INTO claimed;
        IF claimed.started_at = moment THEN
            item_index := claimed.item_index;
            attempt := claimed.attempts;
            item := claimed.item;
            RETURN NEXT;
        ELSIF EXISTS (SELECT FROM pgflow.step_items i WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug
                                                        AND i.item_index = one AND i.status = 'pending' OFFSET 0) THEN
            skipped_on := 'step_items';
        END IF;
        missing := missing - 1;
    END LOOP;
    WHILE missing > 0 AND map.next_item < map.total LOOP -- again where some were reported without a claim
        step := least(map.total - map.next_item, missing);
        got := 0;
        FOR claimed IN
            UPDATE pgflow.step_items i
            SET attempts = i.attempts + 1, started_at = moment, due_at = moment + lease,
                claimed_in = CASE WHEN lease IS NULL THEN pick_items.epoch END
            WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug
              AND i.item_index >= map.next_item AND i.item_index < map.next_item + step AND i.status = 'pending'
              AND i.attempts = map.former_attempts AND i.due_at IS NULL -- not to be tried again later
            RETURNING i.*
        LOOP
            CONTINUE WHEN (claimed.started_at = moment) IS NOT TRUE;
            item_index := claimed.item_index;
            attempt := claimed.attempts;
            item := claimed.item;
            got := got + 1;
            RETURN NEXT;
        END LOOP;
        IF got < step AND EXISTS (
            SELECT FROM pgflow.step_items i
            WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug
              AND i.item_index >= map.next_item AND i.item_index < map.next_item + step AND i.status = 'pending'
              AND i.attempts = map.former_attempts AND i.due_at IS NULL OFFSET 0) THEN
            skipped_on := 'step_items';
        END IF;
        missing := missing - got;
        map.next_item := map.next_item + step;
    END LOOP;
    IF map.next_item > first_fresh THEN
        UPDATE pgflow.step_maps m SET next_item = map.next_item
        WHERE m.run_id = map.run_id AND m.step_slug = map.step_slug
        RETURNING m.next_item INTO stored;
        skipped_on := CASE WHEN (stored = map.next_item) IS NOT TRUE THEN 'step_maps' ELSE skipped_on END;
    END IF;
    IF skipped_on IS NOT NULL THEN
        RAISE EXCEPTION 'a claim of items of step "%" of run % was not stored: a trigger or rule on pgflow.% skipped it',
                        map.step_slug, map.run_id, skipped_on
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.pick_items(pgflow.step_maps, int, int, interval) IS
    'Counts an attempt of so many items of a map in a locked run: those that are due, then fresh ones by a cursor. Internal.';


CREATE OR REPLACE FUNCTION pgflow.claim_items(
    run_id uuid, step_slug text, wanted int, epoch int DEFAULT NULL, lease interval DEFAULT NULL
) RETURNS TABLE (item_index int, attempt int, item jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    map pgflow.step_maps;
    state pgflow.step_states;
    run_status pg_catalog.text;
BEGIN
    IF wanted IS NULL OR wanted OPERATOR(pg_catalog.<) 0 THEN
        RAISE EXCEPTION 'can''t claim % items', coalesce(wanted::pg_catalog.text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Say how many at most: a number of 0 or more.';
    END IF;
    map := pgflow.lock_map(run_id, step_slug, epoch, 'claimed');
    SELECT r.status INTO run_status FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) map.run_id;
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) map.run_id AND s.step_slug OPERATOR(pg_catalog.=) map.step_slug;
    IF (run_status OPERATOR(pg_catalog.=) 'pending' AND state.status OPERATOR(pg_catalog.=) 'pending'
        AND wanted OPERATOR(pg_catalog.>) 0) IS NOT TRUE THEN
        RETURN; -- the map has ended, or its run
    ELSIF map.max_children IS NOT NULL THEN
        RAISE EXCEPTION 'items of step "%" of run % can''t be claimed: each is a run of another workflow', step_slug, run_id
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'The end of that run ends the item. Execute the steps of that run.';
    ELSIF state.started_at IS NULL THEN
        UPDATE pgflow.step_states s
        SET attempts = s.attempts OPERATOR(pg_catalog.+) 1, started_at = pg_catalog.clock_timestamp()
        WHERE s.run_id OPERATOR(pg_catalog.=) map.run_id AND s.step_slug OPERATOR(pg_catalog.=) map.step_slug;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'the claim of step "%" of run % was not stored: a trigger or rule on pgflow.step_states '
                            'skipped it', step_slug, map.run_id
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        END IF;
    END IF;
    RETURN QUERY SELECT p.item_index, p.attempt, p.item FROM pgflow.pick_items(map, wanted, epoch, lease) p;
END
$$;

COMMENT ON FUNCTION pgflow.claim_items(uuid, text, int, int, interval) IS
    'For a process that executes the items of a map: claims so many at most, those that are to be tried again first, and '
    'gives the attempt and the input of each. With a lease they can be claimed again once it is over. No rows: there is '
    'none to do at this moment.';


CREATE OR REPLACE FUNCTION pgflow.release_items(map pgflow.step_maps, epoch int, besides int[]) RETURNS bigint
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    released bigint;
BEGIN
    UPDATE pgflow.step_items i SET due_at = '-infinity', claimed_in = NULL, started_at = NULL
    WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index < map.next_item
      AND i.status = 'pending' AND i.claimed_in = release_items.epoch AND i.item_index <> ALL (besides);
    GET DIAGNOSTICS released = ROW_COUNT;
    IF EXISTS (SELECT FROM pgflow.step_items i
               WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index < map.next_item
                 AND i.status = 'pending' AND i.claimed_in = release_items.epoch
                 AND i.item_index <> ALL (besides) OFFSET 0) THEN
        RAISE EXCEPTION 'the release of items of step "%" of run % was not stored: a trigger or rule on pgflow.step_items '
                        'skipped it', map.step_slug, map.run_id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    RETURN released;
END
$$;

COMMENT ON FUNCTION pgflow.release_items(pgflow.step_maps, int, int[]) IS
    'Lets the items be claimed again that an owner has claimed in this epoch and does not do: the answer to its claim was '
    'lost, say. Reads the items up to the latest claimed one. Internal.';


CREATE OR REPLACE FUNCTION pgflow.note_items(
    map pgflow.step_maps, item_indexes int[], attempts int[], doings text[], results jsonb[], messages text[],
    pauses interval[], OUT accepted int, OUT ended int, OUT failed int
)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    place int;
    doing text;
    new_status text;
    new_due timestamptz;
    stored pgflow.step_items;
BEGIN
    accepted := 0;
    ended := 0;
    failed := 0;
    FOR place IN 1 .. coalesce(cardinality(item_indexes), 0) LOOP -- one by one, as in complete_step
        doing := doings[place];
        new_status := CASE WHEN doing IN ('complete', 'skip') THEN 'completed'
                           WHEN doing = 'fail' THEN 'failed' ELSE 'pending' END;
        new_due := CASE WHEN doing = 'retry' THEN clock_timestamp() + coalesce(pauses[place], '0')
                        WHEN doing = 'defer' THEN clock_timestamp() + pauses[place] END;
        UPDATE pgflow.step_items i
        SET status = new_status,
            item_result = CASE WHEN doing = 'complete' THEN results[place] END,
            skip_reason = CASE WHEN doing = 'skip' THEN 'requested' END,
            error_message = coalesce(messages[place], CASE WHEN doing = 'retry' THEN 'no reason given' END),
            started_at = CASE WHEN doing = 'retry' THEN NULL ELSE i.started_at END,
            finished_at = CASE WHEN doing NOT IN ('retry', 'defer') THEN clock_timestamp() END,
            due_at = new_due, claimed_in = NULL
        WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index = item_indexes[place]
          AND i.status = 'pending'
          AND (note_items.attempts IS NULL
               OR (note_items.attempts[place] = i.attempts AND i.started_at IS NOT NULL))
        RETURNING i.* INTO stored;
        IF FOUND AND stored.status = new_status AND stored.due_at IS NOT DISTINCT FROM new_due
           AND stored.claimed_in IS NULL THEN
            accepted := accepted + 1;
            IF doing NOT IN ('retry', 'defer') THEN
                ended := ended + 1;
            END IF;
            IF doing = 'fail' THEN
                failed := failed + 1;
            END IF;
        ELSIF EXISTS (
            SELECT FROM pgflow.step_items i
            WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.item_index = item_indexes[place]
              AND i.status = 'pending'
              AND (note_items.attempts IS NULL
                   OR (note_items.attempts[place] = i.attempts AND i.started_at IS NOT NULL)) OFFSET 0) THEN
            RAISE EXCEPTION 'the report on item % of step "%" of run % was not stored: a trigger or rule on '
                            'pgflow.step_items skipped it', item_indexes[place], map.step_slug, map.run_id
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.note_items(pgflow.step_maps, int[], int[], text[], jsonb[], text[], interval[]) IS
    'Writes reports on items of a map in a locked run: complete, skip, fail; retry, to be claimed again after a pause; '
    'defer, as another program reports it, and to be claimed again after the pause, if there is one. The first report on '
    'an item wins. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_items(map pgflow.step_maps, ended int, failed int) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    counted pgflow.step_maps;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    IF ended OPERATOR(pg_catalog.=) 0 THEN
        RETURN;
    END IF;
    UPDATE pgflow.step_maps m
    SET remaining = m.remaining OPERATOR(pg_catalog.-) count_items.ended,
        failed = m.failed OPERATOR(pg_catalog.+) count_items.failed
    WHERE m.run_id OPERATOR(pg_catalog.=) map.run_id AND m.step_slug OPERATOR(pg_catalog.=) map.step_slug
    RETURNING m.* INTO counted;
    IF (counted.remaining OPERATOR(pg_catalog.<=) (map.remaining OPERATOR(pg_catalog.-) count_items.ended)) IS NOT TRUE THEN
        RAISE EXCEPTION 'the count of the items of step "%" of run % was not stored: a trigger or rule on '
                        'pgflow.step_maps skipped it', map.step_slug, map.run_id
            USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
    END IF;
    IF counted.remaining OPERATOR(pg_catalog.=) 0 OR count_items.failed OPERATOR(pg_catalog.>) 0 THEN
        PERFORM pgflow.end_map(counted);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.count_items(pgflow.step_maps, int, int) IS
    'Counts items of a map in a locked run that have ended, and ends the map with the last one. Internal.';


CREATE OR REPLACE FUNCTION pgflow.describe_failed_items(map pgflow.step_maps) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
DECLARE
    first_failed text;
BEGIN
    SELECT format('item %s failed: %s', i.item_index, coalesce(i.error_message, 'no reason given')) INTO first_failed
    FROM pgflow.step_items i
    WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.status = 'failed'
    ORDER BY i.item_index LIMIT 1;
    IF map.failed = 1 THEN
        RETURN first_failed;
    END IF;
    RETURN format('%s items of %s failed; %s', map.failed, map.total, first_failed);
END
$$;

COMMENT ON FUNCTION pgflow.describe_failed_items(pgflow.step_maps) IS
    'The error message of a map some of whose items have failed. Internal.';


CREATE OR REPLACE FUNCTION pgflow.gather_results(map pgflow.step_maps, OUT results jsonb, OUT problem text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
BEGIN
    SELECT coalesce(jsonb_agg(coalesce(i.item_result, 'null') ORDER BY i.item_index), '[]') INTO results
    FROM pgflow.step_items i
    WHERE i.run_id = map.run_id AND i.step_slug = map.step_slug AND i.status = 'completed' AND i.skip_reason IS NULL;
    problem := pgflow.find_json_problem(results, false);
EXCEPTION WHEN program_limit_exceeded OR out_of_memory THEN
    problem := 'is too large for one value';
END
$$;

COMMENT ON FUNCTION pgflow.gather_results(pgflow.step_maps) IS
    'The array of the results of a map''s items, in their order, without those that are left out; or why it can''t be '
    'stored. Internal.';


CREATE OR REPLACE FUNCTION pgflow.end_map(map pgflow.step_maps) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    status pg_catalog.text;
    definition bigint;
    policy pg_catalog.text;
    gathered pg_catalog.record;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    SELECT s.status INTO status FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) map.run_id AND s.step_slug OPERATOR(pg_catalog.=) map.step_slug;
    IF (status OPERATOR(pg_catalog.=) 'pending') IS NOT TRUE THEN
        RETURN; -- the step has ended before: cancelled, say. A reopened run looks again
    END IF;
    SELECT r.definition_id INTO definition FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) map.run_id;
    SELECT d.when_item_fails INTO policy FROM pgflow.definition_steps d
    WHERE d.definition_id OPERATOR(pg_catalog.=) definition AND d.slug OPERATOR(pg_catalog.=) map.step_slug;
    IF map.failed OPERATOR(pg_catalog.>) 0 AND policy OPERATOR(pg_catalog.<>) 'skip'
          AND (map.remaining OPERATOR(pg_catalog.=) 0 OR policy OPERATOR(pg_catalog.=) 'stop') THEN
        PERFORM pgflow.fail_step(map.run_id, map.step_slug, pgflow.describe_failed_items(map));
    ELSIF map.remaining OPERATOR(pg_catalog.=) 0 THEN
        SELECT * INTO gathered FROM pgflow.gather_results(map);
        IF gathered.problem IS NULL THEN
            PERFORM pgflow.complete_step(map.run_id, map.step_slug, gathered.results);
        ELSE
            PERFORM pgflow.fail_step(map.run_id, map.step_slug, pg_catalog.format(
                'the array of the results of its %s items %s', map.total, gathered.problem));
        END IF;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.end_map(pgflow.step_maps) IS
    'Ends a map in a locked run: when all of its items have ended, or one has failed and the map stops at that. Internal.';


CREATE OR REPLACE FUNCTION pgflow.report_items(
    run_id uuid, step_slug text, item_indexes int[], epoch int, attempts int[], doing text, results jsonb[],
    messages text[], pause interval
) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    map CONSTANT pgflow.step_maps := pgflow.lock_map(run_id, step_slug, epoch, 'reported');
    noted pg_catalog.record;
BEGIN
    IF pg_catalog.cardinality(attempts) OPERATOR(pg_catalog.<>) pg_catalog.cardinality(item_indexes) THEN
        RAISE EXCEPTION '% items, but % attempts', pg_catalog.cardinality(item_indexes), pg_catalog.cardinality(attempts)
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF map.run_id IS NULL OR coalesce(pg_catalog.cardinality(item_indexes), 0) OPERATOR(pg_catalog.=) 0 THEN
        RETURN 0;
    END IF;
    SELECT * INTO noted FROM pgflow.note_items(
        map, item_indexes, attempts, pg_catalog.array_fill(doing, ARRAY[pg_catalog.cardinality(item_indexes)]), results,
        messages, pg_catalog.array_fill(pause, ARRAY[pg_catalog.cardinality(item_indexes)])) n;
    PERFORM pgflow.count_items(map, noted.ended, noted.failed);
    RETURN noted.accepted;
END
$$;

COMMENT ON FUNCTION pgflow.report_items(uuid, text, int[], int, int[], text, jsonb[], text[], interval) IS
    'What complete_items, fail_items and skip_items have in common. Internal.';


CREATE OR REPLACE FUNCTION pgflow.complete_items(
    run_id uuid, step_slug text, item_indexes int[], item_results jsonb, epoch int DEFAULT NULL,
    attempts int[] DEFAULT NULL
) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    results pg_catalog.jsonb[];
BEGIN
    IF pg_catalog.jsonb_typeof(item_results) OPERATOR(pg_catalog.=) 'array' THEN
        results := ARRAY(SELECT e.result FROM pg_catalog.jsonb_array_elements(item_results)
                         WITH ORDINALITY AS e (result, place) ORDER BY e.place);
    END IF;
    IF (pg_catalog.cardinality(results) OPERATOR(pg_catalog.=) pg_catalog.cardinality(item_indexes)) IS NOT TRUE THEN
        RAISE EXCEPTION '% items, but %', coalesce(pg_catalog.cardinality(item_indexes)::pg_catalog.text, 'NULL'),
                        coalesce(pg_catalog.cardinality(results)::pg_catalog.text, 'no array of') OPERATOR(pg_catalog.||) ' results'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Give an array with the result of each item, in their order.';
    END IF;
    RETURN pgflow.report_items(run_id, step_slug, item_indexes, epoch, attempts, 'complete', results, NULL, NULL);
END
$$;

COMMENT ON FUNCTION pgflow.complete_items(uuid, text, int[], jsonb, int, int[]) IS
    'Stores the results of items of a map, an array as long as their indexes; the last item completes the step with the '
    'array of all results. Returns how many were accepted: the first report on an item wins.';


CREATE OR REPLACE FUNCTION pgflow.fail_items(
    run_id uuid, step_slug text, item_indexes int[], error_messages text[], again_in interval DEFAULT NULL,
    epoch int DEFAULT NULL, attempts int[] DEFAULT NULL
) RETURNS int
LANGUAGE sql VOLATILE
AS $$
    SELECT pgflow.report_items(fail_items.run_id, fail_items.step_slug, fail_items.item_indexes, fail_items.epoch,
                               fail_items.attempts, CASE WHEN fail_items.again_in IS NULL THEN 'fail' ELSE 'retry' END, NULL,
                               fail_items.error_messages, fail_items.again_in)
$$;

COMMENT ON FUNCTION pgflow.fail_items(uuid, text, int[], text[], interval, int, int[]) IS
    'Fails items of a map, for good, or (again_in) to be claimed again later. What a failed item means, its step says: '
    'when_item_fails. Returns how many were accepted.';


CREATE OR REPLACE FUNCTION pgflow.skip_items(
    run_id uuid, step_slug text, item_indexes int[], notes text[] DEFAULT NULL, epoch int DEFAULT NULL,
    attempts int[] DEFAULT NULL
) RETURNS int
LANGUAGE sql VOLATILE
AS $$
    SELECT pgflow.report_items(skip_items.run_id, skip_items.step_slug, skip_items.item_indexes, skip_items.epoch,
                               skip_items.attempts, 'skip', NULL, skip_items.notes, NULL)
$$;

COMMENT ON FUNCTION pgflow.skip_items(uuid, text, int[], text[], int, int[]) IS
    'Leaves items out of the result of their map; the notes are for people. Returns how many were accepted.';


CREATE OR REPLACE FUNCTION pgflow.find_last_attempt(run_id uuid, step_slug text) RETURNS int
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
BEGIN
    PERFORM FROM pgflow.step_maps m
    WHERE m.run_id = find_last_attempt.run_id AND m.step_slug = find_last_attempt.step_slug;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT max(i.attempts) FROM pgflow.step_items i
            WHERE i.run_id = find_last_attempt.run_id AND i.step_slug = find_last_attempt.step_slug);
END
$$;

COMMENT ON FUNCTION pgflow.find_last_attempt(uuid, text) IS
    'The highest number of an attempt of a map''s items; NULL for a step that has none. Internal.';


CREATE OR REPLACE FUNCTION pgflow.reopen_items(run pgflow.runs) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    map record;
    stored pgflow.step_maps;
    skipped_on text; -- the table whose write a trigger or rule has skipped
BEGIN
    FOR map IN
        SELECT m.step_slug, m.next_item, m.failed, m.remaining FROM pgflow.step_maps m
        JOIN pgflow.step_states s ON s.run_id = m.run_id AND s.step_slug = m.step_slug
        WHERE m.run_id = run.id AND s.status = 'failed'
    LOOP
        -- Attempts go on: a late report of a former one stays refused.
        UPDATE pgflow.step_items i
        SET status = 'pending', started_at = NULL, finished_at = NULL, claimed_in = NULL, due_at = '-infinity'
        WHERE i.run_id = run.id AND i.step_slug = map.step_slug
          AND (i.status = 'failed' OR (i.status = 'pending' AND i.item_index < map.next_item));
        skipped_on := CASE WHEN EXISTS (
            SELECT FROM pgflow.step_items i
            WHERE i.run_id = run.id AND i.step_slug = map.step_slug
              AND (i.status = 'failed'
                   OR (i.status = 'pending' AND i.item_index < map.next_item
                       AND (i.started_at, i.claimed_in, i.due_at) IS DISTINCT FROM
                           (NULL::timestamptz, NULL::int, '-infinity'::timestamptz))) OFFSET 0) THEN 'step_items' END;
        UPDATE pgflow.step_maps m SET failed = 0, remaining = m.remaining + map.failed
        WHERE m.run_id = run.id AND m.step_slug = map.step_slug
        RETURNING m.* INTO stored;
        IF (stored.failed = 0 AND stored.remaining = map.remaining + map.failed) IS NOT TRUE THEN
            skipped_on := 'step_maps';
        END IF;
        IF skipped_on IS NOT NULL THEN
            RAISE EXCEPTION 'the items of step "%" of run % were not reopened: a trigger or rule on pgflow.% skipped it',
                            map.step_slug, run.id, skipped_on
                USING ERRCODE = 'triggered_action_exception', HINT = 'A BEFORE trigger has to RETURN NEW.';
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.reopen_items(pgflow.runs) IS
    'In a run that is being reopened: failed items of failed maps, and those under way, can be claimed again; those that '
    'have completed keep their results. Internal.';


------------------------------------------------------------------------------------------------------------
-- Children: a step that is a run of another workflow, its child; a map of children has one for each item. A child begins in
-- the transaction that starts its step, and its end ends the step in its own transaction.
--
-- The lock of a child comes before that of its parent. So a transaction that holds the parent's row never waits for that of
-- a child. Where another one holds it, it leaves a request, and move_children looks at that child later.
--
-- An attempt of a step, or of an item, is one child. Its number is in the child's row, and a unique index holds that no
-- attempt has two. A report of a child carries the number: it counts for that attempt only.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.refuse_children(of_workflow text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET jit = off
AS $$
DECLARE
    wrong record;
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow.steps s WHERE s.workflow_slug = of_workflow AND s.child_workflow IS NOT NULL) THEN
        RETURN;
    END IF;
    -- By depth, without paths: of many workflows that share their children, there are too many paths.
    WITH RECURSIVE below (first_child, slug, depth) AS (
        SELECT DISTINCT s.child_workflow, s.child_workflow, 1 FROM pgflow.steps s
        WHERE s.workflow_slug = of_workflow AND s.child_workflow IS NOT NULL
        UNION
        SELECT b.first_child, s.child_workflow, b.depth + 1 FROM below b
        JOIN pgflow.steps s ON s.workflow_slug = b.slug AND s.child_workflow IS NOT NULL
        WHERE b.slug <> of_workflow AND b.depth < 21
    )
    SELECT b.first_child, b.slug = of_workflow AS is_circle, s.slug INTO wrong
    FROM below b JOIN pgflow.steps s ON s.workflow_slug = of_workflow AND s.child_workflow = b.first_child
    WHERE b.slug = of_workflow OR b.depth > 20
    ORDER BY b.slug <> of_workflow, b.depth, s.slug LIMIT 1;
    IF NOT FOUND THEN
        RETURN;
    ELSIF wrong.is_circle THEN
        RAISE EXCEPTION 'workflow "%" would run itself: its step "%" runs workflow "%"%', of_workflow, wrong.slug,
                        wrong.first_child, CASE WHEN wrong.first_child <> of_workflow THEN ', which leads back to it' ELSE '' END
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Its runs would begin one another without end.';
    END IF;
    RAISE EXCEPTION 'workflow "%" nests workflows more than 20 deep: by its step "%", which runs workflow "%"', of_workflow,
                    wrong.slug, wrong.first_child
        USING ERRCODE = 'invalid_parameter_value', HINT = 'The end of a run ends all runs above it in one transaction.';
END
$$;

COMMENT ON FUNCTION pgflow.refuse_children(text) IS
    'Raises 22023 where a workflow reaches itself by its children, or nests them more than 20 deep. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_ancestors(run_id uuid) RETURNS int
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    ancestors int := 0;
    above uuid := run_id;
BEGIN
    LOOP
        SELECT r.parent_run_id INTO above FROM pgflow.runs r WHERE r.id = above;
        EXIT WHEN above IS NULL OR ancestors >= 20;
        ancestors := ancestors + 1;
    END LOOP;
    RETURN ancestors;
END
$$;

COMMENT ON FUNCTION pgflow.count_ancestors(uuid) IS 'How many runs this one is nested in, 20 at most. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_input(run pgflow.runs, step pgflow.definition_steps, item jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    is_map CONSTANT boolean := step.step_type = 'map';
BEGIN
    RETURN jsonb_build_object('payload', CASE
               WHEN NOT is_map OR step.map_over IS NOT NULL THEN run.payload
               WHEN cardinality(step.map_path) > 0 THEN run.payload #- step.map_path ELSE 'null' END)
        || coalesce((
            SELECT jsonb_object_agg(CASE WHEN u.step_slug = 'payload' OR (is_map AND u.step_slug = 'item')
                                         THEN u.step_slug || '_' ELSE u.step_slug END, u.step_result)
            FROM pgflow.definition_deps d
            CROSS JOIN LATERAL (
                SELECT s.step_slug, s.step_result FROM pgflow.step_states s
                WHERE s.run_id = run.id AND s.step_slug = d.from_step_slug AND s.status = 'completed'
                  AND s.skip_reason IS NULL OFFSET 0) u -- as in closes_cycle
            WHERE d.definition_id = run.definition_id AND d.to_step_slug = step.slug
              AND (NOT is_map OR d.from_step_slug <> coalesce(step.map_over, ''))), '{}')
        || CASE WHEN is_map THEN jsonb_build_object('item', item) ELSE '{}' END;
END
$$;

COMMENT ON FUNCTION pgflow.find_input(pgflow.runs, pgflow.definition_steps, jsonb) IS
    'The input of a step or of an item, as SQL functions get it: {"payload": ..., "<upstream step>": its result, ...}, and '
    '"item" without what the map maps over. Internal.';


CREATE OR REPLACE FUNCTION pgflow.read_leaves(run pgflow.runs, OUT result jsonb, OUT problem text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET enable_hashjoin = on SET enable_mergejoin = on SET enable_seqscan = on
SET enable_bitmapscan = on SET jit = off
AS $$
BEGIN
    SELECT coalesce(jsonb_object_agg(s.step_slug, s.step_result), '{}') INTO result FROM pgflow.step_states s
    WHERE s.run_id = run.id AND s.status = 'completed' AND s.skip_reason IS NULL
      AND NOT EXISTS (SELECT FROM pgflow.definition_deps d
                      WHERE d.definition_id = run.definition_id AND d.from_step_slug = s.step_slug);
    problem := pgflow.find_json_problem(result, false);
EXCEPTION WHEN program_limit_exceeded OR out_of_memory THEN
    problem := 'is too large for one value';
END
$$;

COMMENT ON FUNCTION pgflow.read_leaves(pgflow.runs) IS
    'The result of a run: an object with the results of its steps that none waits for, without those that were skipped; or '
    'why it can''t be stored. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_child(run_id uuid, step_slug text, item_index int, attempt int) RETURNS pgflow.runs
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    child pgflow.runs;
BEGIN
    SELECT * INTO child FROM pgflow.runs r
    WHERE r.parent_run_id = find_child.run_id AND r.parent_step_slug = find_child.step_slug
      AND coalesce(r.parent_item, -1) = coalesce(find_child.item_index, -1) AND r.parent_attempt = find_child.attempt;
    RETURN child;
END
$$;

COMMENT ON FUNCTION pgflow.find_child(uuid, text, int, int) IS
    'The child of an attempt of a step, or of an item; all NULL where there is none. Internal.';


CREATE OR REPLACE FUNCTION pgflow.list_pending_children(run_id uuid, step_slug text, of_items boolean) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF step_slug IS NULL THEN
        RETURN QUERY
            SELECT r.id FROM (SELECT c.id, c.status FROM pgflow.runs c
                              WHERE c.parent_run_id = list_pending_children.run_id OFFSET 0) r
            WHERE r.status = 'pending';
    ELSE
        RETURN QUERY
            SELECT r.id FROM (SELECT c.id, c.status, c.parent_item FROM pgflow.runs c
                              WHERE c.parent_run_id = list_pending_children.run_id
                                AND c.parent_step_slug = list_pending_children.step_slug OFFSET 0) r
            WHERE r.status = 'pending' AND (of_items OR r.parent_item IS NULL);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.list_pending_children(uuid, text, boolean) IS
    'The pending children of a run, or of one of its steps. Internal.';


CREATE OR REPLACE FUNCTION pgflow.describe_child_end(child pgflow.runs) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    SELECT format('run %s of workflow "%s" %s: %s', child.id, child.workflow_slug,
                  CASE WHEN child.ended_as IS NULL THEN 'has failed' ELSE 'was cancelled' END,
                  coalesce(child.error_message, 'no reason given'))
$$;

COMMENT ON FUNCTION pgflow.describe_child_end(pgflow.runs) IS 'Why a step failed whose child has failed. Internal.';


CREATE OR REPLACE FUNCTION pgflow.begin_child(
    run pgflow.runs, step pgflow.definition_steps, item_index int, attempt int, item jsonb
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    wanted pgflow.runs;
    child pgflow.runs;
    input CONSTANT pg_catalog.jsonb := pgflow.find_input(run, step, item);
    beginning CONSTANT pg_catalog.text := pg_catalog.current_setting('pgflow.beginning', true);
    problem pg_catalog.text;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    wanted.workflow_slug := step.child_workflow;
    wanted.id := pg_catalog.gen_random_uuid(); -- one that others can guess could be taken before
    wanted.payload := CASE WHEN step.child_payload IS NULL THEN input
                           ELSE input OPERATOR(pg_catalog.#>) step.child_payload END;
    wanted.parent_run_id := run.id;
    wanted.parent_step_slug := step.slug;
    wanted.parent_item := item_index;
    wanted.parent_attempt := attempt;
    wanted.logical_date := run.logical_date;
    wanted.data_interval := run.data_interval;
    IF wanted.payload IS NULL THEN
        problem := pg_catalog.format('there is nothing at %s in the step''s input for the payload of a run of workflow "%s"',
                                     pg_catalog.array_to_string(step.child_payload, '.'), step.child_workflow);
    ELSIF pgflow.count_ancestors(run.id) OPERATOR(pg_catalog.>=) 20 THEN
        problem := pg_catalog.format('run %s is nested in 20 runs, and can''t begin another one', run.id);
    ELSE
        -- Where a child ends while it begins, because all of its steps are skipped, say, the caller tells its parent.
        PERFORM pg_catalog.set_config('pgflow.beginning', wanted.id::pg_catalog.text, true);
        BEGIN
            child := pgflow.begin_run(wanted);
        EXCEPTION WHEN invalid_parameter_value OR no_data_found THEN -- no such workflow, no steps, a cycle, a large payload
            problem := pg_catalog.format('a run of workflow "%s" can''t begin: %s', step.child_workflow, SQLERRM);
        END;
        PERFORM pg_catalog.set_config('pgflow.beginning', coalesce(beginning, ''), true);
    END IF;
    IF problem IS NULL THEN
        SELECT * INTO child FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) wanted.id; -- a trigger may have moved it
        RETURN child;
    END IF;
    wanted.id := NULL;
    wanted.status := 'failed';
    wanted.error_message := problem;
    RETURN wanted;
END
$$;

COMMENT ON FUNCTION pgflow.begin_child(pgflow.runs, pgflow.definition_steps, int, int, jsonb) IS
    'Begins the child of an attempt in a locked run, and returns it. It may have ended already. Without an id, it could not '
    'begin, and error_message says why. Internal.';


CREATE OR REPLACE FUNCTION pgflow.may_try_again(
    child pgflow.runs, run pgflow.runs, step pgflow.definition_steps, former_attempts int
) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    SELECT child.id IS NOT NULL AND child.status = 'failed' AND child.ended_as IS NULL AND run.status = 'pending'
       AND child.parent_attempt - coalesce(former_attempts, 0) <= step.child_retries
$$;

COMMENT ON FUNCTION pgflow.may_try_again(pgflow.runs, pgflow.runs, pgflow.definition_steps, int) IS
    'Whether a failed child is followed by another one: the step has retries left, and the child was not cancelled. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_step(definition_id bigint, step_slug text) RETURNS pgflow.definition_steps
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    step pgflow.definition_steps;
BEGIN
    SELECT * INTO step FROM pgflow.definition_steps d
    WHERE d.definition_id = find_step.definition_id AND d.slug = find_step.step_slug;
    RETURN step;
END
$$;

COMMENT ON FUNCTION pgflow.find_step(bigint, text) IS 'A step as its run knows it. Internal.';


CREATE OR REPLACE FUNCTION pgflow.attempt_child(run pgflow.runs, step_slug text) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    step CONSTANT pgflow.definition_steps := pgflow.find_step(run.definition_id, step_slug);
    state pgflow.step_states;
    child pgflow.runs;
    former int;
BEGIN
    SELECT u.attempts INTO former FROM pgflow.undone_steps u
    WHERE u.run_id OPERATOR(pg_catalog.=) run.id AND u.step_slug OPERATOR(pg_catalog.=) attempt_child.step_slug;
    LOOP
        UPDATE pgflow.step_states s
        SET attempts = s.attempts OPERATOR(pg_catalog.+) 1, started_at = pg_catalog.clock_timestamp()
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) attempt_child.step_slug
          AND s.status OPERATOR(pg_catalog.=) 'pending'
        RETURNING s.* INTO state;
        IF NOT FOUND THEN
            PERFORM pgflow.find_refused(run, step_slug, NULL, NULL, 'begun');
            RETURN; -- skipped by hand before
        END IF;
        child := pgflow.begin_child(run, step, NULL, state.attempts, NULL);
        EXIT WHEN NOT pgflow.may_try_again(child, run, step, former);
    END LOOP;
    IF child.status OPERATOR(pg_catalog.<>) 'pending' THEN
        PERFORM pgflow.end_by_child(child);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.attempt_child(pgflow.runs, text) IS
    'Begins a child for a pending step of a locked run, as the next attempt of the step. Internal.';


CREATE OR REPLACE FUNCTION pgflow.end_by_child(child pgflow.runs) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    gathered pg_catalog.record;
    message pg_catalog.text;
BEGIN
    IF child.status OPERATOR(pg_catalog.=) 'completed' THEN
        SELECT * INTO gathered FROM pgflow.read_leaves(child);
        IF gathered.problem IS NOT NULL THEN
            message := pg_catalog.format('the result of run %s of workflow "%s" %s', child.id, child.workflow_slug,
                                         gathered.problem);
        END IF;
    ELSE
        message := CASE WHEN child.id IS NULL THEN child.error_message ELSE pgflow.describe_child_end(child) END;
    END IF;
    IF child.parent_item IS NOT NULL AND message IS NULL THEN
        PERFORM pgflow.complete_items(child.parent_run_id, child.parent_step_slug, ARRAY[child.parent_item],
                                      pg_catalog.jsonb_build_array(gathered.result), NULL, ARRAY[child.parent_attempt]);
    ELSIF child.parent_item IS NOT NULL THEN
        PERFORM pgflow.fail_items(child.parent_run_id, child.parent_step_slug, ARRAY[child.parent_item], ARRAY[message],
                                  NULL, NULL, ARRAY[child.parent_attempt]);
    ELSIF message IS NULL THEN
        PERFORM pgflow.complete_step(child.parent_run_id, child.parent_step_slug, gathered.result, NULL,
                                     child.parent_attempt);
    ELSE
        PERFORM pgflow.fail_step(child.parent_run_id, child.parent_step_slug, message, NULL, child.parent_attempt);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.end_by_child(pgflow.runs) IS
    'Ends the step or the item whose child has ended, in a locked run, for good. Internal.';


CREATE OR REPLACE FUNCTION pgflow.begin_children(run pgflow.runs, steps text[]) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    begun pg_catalog.text;
    map pgflow.step_maps;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    FOREACH begun IN ARRAY steps LOOP
        SELECT * INTO map FROM pgflow.step_maps m
        WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) begun;
        IF FOUND THEN
            PERFORM pgflow.begin_items(run.id, begun, map.max_children);
        ELSE
            PERFORM pgflow.attempt_child(run, begun);
        END IF;
        SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) run.id;
        EXIT WHEN run.status OPERATOR(pg_catalog.<>) 'pending'; -- one has failed at once
    END LOOP;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.begin_children(pgflow.runs, text[]) IS
    'Begins the children of steps of a locked run that have just started, and returns the run. Internal.';


CREATE OR REPLACE FUNCTION pgflow.begin_items(run_id uuid, step_slug text, wanted int) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    step pgflow.definition_steps;
    map pgflow.step_maps;
    picked pg_catalog.record;
    child pgflow.runs;
    places int := wanted;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    WHILE places OPERATOR(pg_catalog.>) 0 LOOP -- one by one: the end of a child may end the map
        SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) begin_items.run_id;
        EXIT WHEN run.status OPERATOR(pg_catalog.<>) 'pending';
        PERFORM FROM pgflow.step_states s
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) begin_items.step_slug
          AND s.status OPERATOR(pg_catalog.=) 'pending';
        EXIT WHEN NOT FOUND;
        SELECT * INTO map FROM pgflow.step_maps m
        WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) begin_items.step_slug;
        SELECT * INTO picked FROM pgflow.pick_items(map, 1, NULL, NULL);
        EXIT WHEN NOT FOUND;
        IF step.slug IS NULL THEN
            step := pgflow.find_step(run.definition_id, step_slug);
        END IF;
        child := pgflow.begin_child(run, step, picked.item_index, picked.attempt, picked.item);
        IF child.status OPERATOR(pg_catalog.=) 'pending' THEN
            places := places OPERATOR(pg_catalog.-) 1;
        ELSIF pgflow.may_try_again(child, run, step, map.former_attempts) THEN
            PERFORM pgflow.fail_items(run.id, step_slug, ARRAY[picked.item_index],
                                      ARRAY[pgflow.describe_child_end(child)], INTERVAL '0', NULL, ARRAY[picked.attempt]);
        ELSE
            PERFORM pgflow.end_by_child(child);
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.begin_items(uuid, text, int) IS
    'Begins so many children for the next items of a pending map in a locked run. Internal.';


CREATE OR REPLACE FUNCTION pgflow.report_to_parent(child pgflow.runs) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    parent pgflow.runs;
    step pgflow.definition_steps;
    state pgflow.step_states;
    item pgflow.step_items;
    former int;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    IF pg_catalog.current_setting('pgflow.beginning', true) OPERATOR(pg_catalog.=) child.id::pg_catalog.text THEN
        RETURN; -- the caller of begin_child tells its parent
    END IF;
    SELECT * INTO parent FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) child.parent_run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN; -- it was deleted
    END IF;
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) parent.id AND s.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug;
    IF child.parent_item IS NOT NULL THEN
        SELECT * INTO item FROM pgflow.step_items i
        WHERE i.run_id OPERATOR(pg_catalog.=) parent.id AND i.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug
          AND i.item_index OPERATOR(pg_catalog.=) child.parent_item;
        state.attempts := item.attempts;
        state.started_at := item.started_at;
        SELECT m.former_attempts INTO former FROM pgflow.step_maps m
        WHERE m.run_id OPERATOR(pg_catalog.=) parent.id AND m.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug;
    ELSE
        SELECT u.attempts INTO former FROM pgflow.undone_steps u
        WHERE u.run_id OPERATOR(pg_catalog.=) parent.id AND u.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug;
    END IF;
    IF (state.attempts OPERATOR(pg_catalog.=) child.parent_attempt AND state.started_at IS NOT NULL) IS NOT TRUE THEN
        RETURN; -- of a former attempt, or of one that was taken back
    END IF;
    step := pgflow.find_step(parent.definition_id, child.parent_step_slug);
    IF state.status OPERATOR(pg_catalog.=) 'pending' AND pgflow.may_try_again(child, parent, step, former) THEN
        IF child.parent_item IS NULL THEN
            PERFORM pgflow.attempt_child(parent, step.slug);
        ELSE
            PERFORM pgflow.fail_items(parent.id, step.slug, ARRAY[child.parent_item],
                                      ARRAY[pgflow.describe_child_end(child)], INTERVAL '0', NULL,
                                      ARRAY[child.parent_attempt]);
        END IF;
    ELSE
        PERFORM pgflow.end_by_child(child); -- the first report wins
    END IF;
    IF child.parent_item IS NOT NULL THEN
        PERFORM pgflow.begin_items(parent.id, step.slug, 1); -- in its place
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.report_to_parent(pgflow.runs) IS
    'Ends the step or the item whose child has just ended, or begins another child for it, in the same transaction. Internal.';


CREATE OR REPLACE FUNCTION pgflow.leave_children(
    run_id uuid, step_slug text, of_items boolean DEFAULT true
) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    child pg_catalog.uuid;
    looks int := 0;
BEGIN
    FOR child IN SELECT c FROM pgflow.list_pending_children(run_id, step_slug, of_items) c LOOP
        looks := looks OPERATOR(pg_catalog.+) 1;
        IF looks OPERATOR(pg_catalog.>) 100 OR NOT pgflow.move_child(child) THEN
            INSERT INTO pgflow.child_requests (run_id) VALUES (child);
        END IF;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow.leave_children(uuid, text, boolean) IS
    'Cancels the pending children of a locked run, or of one of its steps, that it does not wait for any more: up to 100 at '
    'once, and the others by requests. Internal.';


CREATE OR REPLACE FUNCTION pgflow.judge_child(child pgflow.runs, parent pgflow.runs) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    state pgflow.step_states;
    item pgflow.step_items;
BEGIN
    SELECT * INTO state FROM pgflow.step_states s WHERE s.run_id = parent.id AND s.step_slug = child.parent_step_slug;
    IF child.parent_item IS NOT NULL AND state.status = 'pending' THEN
        SELECT * INTO item FROM pgflow.step_items i
        WHERE i.run_id = parent.id AND i.step_slug = child.parent_step_slug AND i.item_index = child.parent_item;
        state.attempts := item.attempts;
        state.started_at := item.started_at;
        state.status := item.status;
        state.skip_reason := item.skip_reason;
    END IF;
    IF child.status = 'pending' AND (
           state.status IS NULL OR state.status = 'failed' OR state.skip_reason IS NOT NULL
           OR (state.attempts <> child.parent_attempt AND (child.parent_item IS NULL OR item.run_id IS NOT NULL))) THEN
        RETURN 'cancel';
    ELSIF parent.status <> 'pending' OR (state.status = 'pending' AND state.attempts = child.parent_attempt) IS NOT TRUE THEN
        RETURN NULL; -- it goes on, where it does: a step was completed by hand, or the run has failed by another one
    ELSIF child.status = 'failed' AND state.started_at IS NULL THEN
        RETURN 'reopen';
    ELSIF child.status <> 'pending' THEN
        RETURN 'report';
    ELSIF state.started_at IS NULL THEN
        RETURN 'await';
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow.judge_child(pgflow.runs, pgflow.runs) IS
    'What is to be done with a locked child of a locked run: cancel, as the step does not wait for it any more; reopen, as the '
    'step was; report its end; await, as the step was reopened and the child goes on; NULL: nothing. Internal.';


CREATE OR REPLACE FUNCTION pgflow.describe_leave(child pgflow.runs, parent pgflow.runs) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    SELECT CASE WHEN parent.ended_as = 'cancelled'
                THEN format('its parent run %s was cancelled: %s', parent.id, coalesce(parent.error_message, 'no reason given'))
                ELSE format('step "%s" of its parent run %s does not wait for it any more', child.parent_step_slug, parent.id)
           END
$$;

COMMENT ON FUNCTION pgflow.describe_leave(pgflow.runs, pgflow.runs) IS 'Why a child is cancelled. Internal.';


CREATE OR REPLACE FUNCTION pgflow.await_child_again(child pgflow.runs) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    parent pgflow.runs;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    SELECT * INTO parent FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) child.parent_run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    PERFORM FROM pgflow.step_states s
    WHERE parent.status OPERATOR(pg_catalog.=) 'pending' AND s.run_id OPERATOR(pg_catalog.=) parent.id
      AND s.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug AND s.status OPERATOR(pg_catalog.=) 'pending';
    IF FOUND AND child.parent_item IS NULL THEN
        UPDATE pgflow.step_states s SET started_at = coalesce(s.started_at, pg_catalog.clock_timestamp())
        WHERE s.run_id OPERATOR(pg_catalog.=) parent.id AND s.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug
          AND s.attempts OPERATOR(pg_catalog.=) child.parent_attempt;
    ELSIF FOUND THEN
        UPDATE pgflow.step_items i
        SET started_at = coalesce(i.started_at, pg_catalog.clock_timestamp()), due_at = NULL, claimed_in = NULL
        WHERE i.run_id OPERATOR(pg_catalog.=) parent.id AND i.step_slug OPERATOR(pg_catalog.=) child.parent_step_slug
          AND i.item_index OPERATOR(pg_catalog.=) child.parent_item AND i.status OPERATOR(pg_catalog.=) 'pending'
          AND i.attempts OPERATOR(pg_catalog.=) child.parent_attempt;
    END IF;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % can''t be reopened: step "%" of its parent run % does not wait for it', child.id,
                        child.parent_step_slug, parent.id
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'runs_status',
                  HINT = pg_catalog.format('Reopen run %s: its step reopens this one.', parent.id);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.await_child_again(pgflow.runs) IS
    'Has the step or the item wait again for a locked child that is being reopened or goes on; 55000 where it does not. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow.move_child(child_id uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    child pgflow.runs;
    parent pgflow.runs;
    verdict pg_catalog.text;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    SELECT * INTO child FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) child_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) child_id);
    END IF;
    SELECT * INTO parent FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) child.parent_run_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RETURN true;
    END IF;
    verdict := pgflow.judge_child(child, parent);
    IF verdict OPERATOR(pg_catalog.=) 'cancel' THEN
        PERFORM pgflow.cancel_run(child.id, pgflow.describe_leave(child, parent));
    ELSIF verdict OPERATOR(pg_catalog.=) 'reopen' THEN
        BEGIN
            PERFORM pgflow.reopen_run(child.id);
        EXCEPTION WHEN object_not_in_prerequisite_state THEN -- a step of it was deleted from its workflow, say
            child.id := NULL;
            child.error_message := SQLERRM;
        END;
        IF child.id IS NULL THEN
            PERFORM pgflow.await_child_again(child);
            PERFORM pgflow.end_by_child(child);
        END IF;
    ELSIF verdict OPERATOR(pg_catalog.=) ANY ('{report,await}'::pg_catalog.text[]) THEN
        PERFORM pgflow.await_child_again(child);
        IF verdict OPERATOR(pg_catalog.=) 'report' THEN
            PERFORM pgflow.report_to_parent(child);
        END IF;
    END IF;
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow.move_child(uuid) IS
    'Does with a child what judge_child says. False where another transaction holds it: nothing was done then. Internal.';


CREATE OR REPLACE FUNCTION pgflow.list_awaited(run_id uuid, definition_id bigint)
RETURNS TABLE (slug text, is_map boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET enable_nestloop = off SET enable_hashjoin = on SET enable_mergejoin = on SET enable_seqscan = on
SET enable_bitmapscan = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT d.slug, d.step_type = 'map' FROM pgflow.definition_steps d
        JOIN pgflow.step_states s ON s.run_id = list_awaited.run_id AND s.step_slug = d.slug AND s.status = 'pending'
        WHERE d.definition_id = list_awaited.definition_id AND d.child_workflow IS NOT NULL
        ORDER BY d.slug;
END
$$;

COMMENT ON FUNCTION pgflow.list_awaited(uuid, bigint) IS 'The pending steps of a run that are children. Internal.';


CREATE OR REPLACE FUNCTION pgflow.list_begun_items(run_id uuid, step_slug text)
RETURNS TABLE (item_index int, child_id uuid, waits boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT i.item_index, c.id, coalesce(c.status = 'pending' AND i.started_at IS NOT NULL, false)
        FROM pgflow.step_items i
        LEFT JOIN LATERAL (
            SELECT f.id, f.status
            FROM pgflow.find_child(list_begun_items.run_id, list_begun_items.step_slug, i.item_index, i.attempts) f
            WHERE f.id IS NOT NULL OFFSET 0) c ON true
        WHERE i.run_id = list_begun_items.run_id AND i.step_slug = list_begun_items.step_slug AND i.status = 'pending'
          AND i.item_index < (SELECT m.next_item FROM pgflow.step_maps m
                              WHERE m.run_id = list_begun_items.run_id AND m.step_slug = list_begun_items.step_slug);
END
$$;

COMMENT ON FUNCTION pgflow.list_begun_items(uuid, text) IS
    'The pending items of a map that had a child before, with that of their latest attempt, and whether the item waits for it. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow.look_at_child(child_id uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF NOT pgflow.move_child(child_id) THEN
        INSERT INTO pgflow.child_requests (run_id) VALUES (child_id);
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.look_at_child(uuid) IS 'move_child, or a request for it. Internal.';


CREATE OR REPLACE FUNCTION pgflow.resume_item_children(run pgflow.runs, step_slug text) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    map pgflow.step_maps;
    begun pg_catalog.record;
    under_way int := 0;
    looks int := 0;
BEGIN
    SELECT * INTO map FROM pgflow.step_maps m
    WHERE m.run_id OPERATOR(pg_catalog.=) run.id AND m.step_slug OPERATOR(pg_catalog.=) resume_item_children.step_slug;
    FOR begun IN SELECT * FROM pgflow.list_begun_items(run.id, step_slug) LOOP
        UPDATE pgflow.step_items i
        SET due_at = CASE WHEN begun.child_id IS NULL THEN '-infinity'::pg_catalog.timestamptz END
        WHERE i.run_id OPERATOR(pg_catalog.=) run.id AND i.step_slug OPERATOR(pg_catalog.=) resume_item_children.step_slug
          AND i.item_index OPERATOR(pg_catalog.=) begun.item_index;
        IF begun.child_id IS NOT NULL THEN -- else it was deleted: begin_items makes it anew
            under_way := under_way OPERATOR(pg_catalog.+) 1;
        END IF;
    END LOOP;
    -- Only now: a child may end at once, and what is due begins in its place.
    FOR begun IN
        SELECT * FROM pgflow.list_begun_items(run.id, step_slug) b WHERE b.child_id IS NOT NULL AND NOT b.waits
    LOOP
        looks := looks OPERATOR(pg_catalog.+) 1;
        IF looks OPERATOR(pg_catalog.>) 100 THEN
            INSERT INTO pgflow.child_requests (run_id) VALUES (begun.child_id);
        ELSE
            PERFORM pgflow.look_at_child(begun.child_id);
        END IF;
    END LOOP;
    PERFORM pgflow.begin_items(run.id, step_slug, map.max_children OPERATOR(pg_catalog.-) under_way);
END
$$;

COMMENT ON FUNCTION pgflow.resume_item_children(pgflow.runs, text) IS
    'What resume_children does for a map. Internal.';


CREATE OR REPLACE FUNCTION pgflow.resume_children(run pgflow.runs) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    awaited pg_catalog.record;
    state pgflow.step_states;
    child pgflow.runs;
BEGIN
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RETURN run;
    END IF;
    FOR awaited IN SELECT * FROM pgflow.list_awaited(run.id, run.definition_id) LOOP
        SELECT * INTO state FROM pgflow.step_states s
        WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) awaited.slug;
        CONTINUE WHEN (state.status OPERATOR(pg_catalog.=) 'pending') IS NOT TRUE;
        IF awaited.is_map THEN
            PERFORM pgflow.resume_item_children(run, awaited.slug);
        ELSE
            child := pgflow.find_child(run.id, awaited.slug, NULL, state.attempts);
            IF child.id IS NULL THEN -- the step was inserted by hand, or the child was deleted, or could not begin
                PERFORM pgflow.attempt_child(run, awaited.slug);
            ELSIF child.status OPERATOR(pg_catalog.<>) 'pending' OR state.started_at IS NULL THEN
                PERFORM pgflow.look_at_child(child.id);
            END IF;
        END IF;
        SELECT * INTO run FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) run.id;
        EXIT WHEN run.status OPERATOR(pg_catalog.<>) 'pending';
    END LOOP;
    RETURN run;
END
$$;

COMMENT ON FUNCTION pgflow.resume_children(pgflow.runs) IS
    'In a locked run that was counted again: begins children that are missing, and has failed ones of reopened steps go on. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow.move_children(at_most int DEFAULT 1) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    request pgflow.child_requests;
    moved int := 0;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    FOR request IN
        SELECT c.* FROM pgflow.child_requests c ORDER BY c.id FOR UPDATE SKIP LOCKED
    LOOP
        EXIT WHEN moved OPERATOR(pg_catalog.>=) at_most;
        CONTINUE WHEN NOT pgflow.move_child(request.run_id);
        DELETE FROM pgflow.child_requests c WHERE c.id OPERATOR(pg_catalog.=) request.id;
        moved := moved OPERATOR(pg_catalog.+) 1;
    END LOOP;
    RETURN moved;
END
$$;

COMMENT ON FUNCTION pgflow.move_children(int) IS
    'Cancels children that their parents have left, and reopens those that they wait for again, where no other transaction holds '
    'them; returns how many. Services call it. Each call with 1 is a transaction of its own, and can take part in no deadlock.';


------------------------------------------------------------------------------------------------------------
-- Backfills: runs of a workflow for dates of the past, one a date, so many at a time.
--
-- A backfill has one row for each of its dates from the beginning. advance_backfill starts runs for as many of them as may
-- be under way. The end of a run calls it in its own transaction, and services call it now and then. It waits for no
-- other session that does so: it leaves the backfill to that one, and a date that another session decides. So the end of
-- a run never waits for a backfill, and a session that holds a backfill may wait for runs. What else may wait is an edit
-- of the workflow, or a trigger of a user. A session that cancels such a wait undoes the start, and not the run's end.
--
-- The id of a date's run follows from workflow and date. So a date that is started twice has one run.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow.format_date(moment timestamptz) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    SELECT to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS')
        || CASE WHEN date_trunc('second', moment AT TIME ZONE 'UTC') = moment AT TIME ZONE 'UTC' THEN ''
                ELSE to_char(moment AT TIME ZONE 'UTC', '.US') END || '+00:00'
$$;

COMMENT ON FUNCTION pgflow.format_date(timestamptz) IS
    'A moment in UTC, as ISO 8601 and Python write it: the same text whatever the time zone of the session is.';


CREATE OR REPLACE FUNCTION pgflow.add_dates(payload jsonb, logical_date timestamptz, data_interval tstzrange)
RETURNS jsonb
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    SELECT payload || jsonb_strip_nulls(jsonb_build_object(
        'logical_date', pgflow.format_date(logical_date),
        'interval_start', pgflow.format_date(lower(data_interval)),
        'interval_end', pgflow.format_date(upper(data_interval))))
$$;

COMMENT ON FUNCTION pgflow.add_dates(jsonb, timestamptz, tstzrange) IS
    'The payload of the run of a date: an object, and in it what date the run is about.';


CREATE OR REPLACE FUNCTION pgflow.decide_date(on_existing text, status text) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    SELECT CASE WHEN status IS NULL THEN 'start'
                WHEN on_existing = 'failed' AND status = 'failed' THEN 'reopen'
                WHEN on_existing = 'all' AND status <> 'pending' THEN 'start'
                ELSE 'leave' END
$$;

COMMENT ON FUNCTION pgflow.decide_date(text, text) IS
    'What a backfill does with a date whose latest run has this status (NULL: there is none): start, reopen, leave.';


CREATE OR REPLACE FUNCTION pgflow.find_dated_run(
    workflow_slug text, logical_date timestamptz, OUT run_id uuid, OUT status text
)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    -- A range and its order, so that no other index will do: on a table that was analyzed while it was empty, reading all
    -- of it by its primary key looks as cheap.
    SELECT d.id, d.status INTO run_id, status
    FROM (SELECT r.id, r.status, r.created_at FROM pgflow.runs r
          WHERE r.workflow_slug = find_dated_run.workflow_slug
            AND r.logical_date BETWEEN find_dated_run.logical_date AND find_dated_run.logical_date
          ORDER BY r.logical_date OFFSET 0) d
    ORDER BY d.created_at DESC NULLS LAST, d.id LIMIT 1;
END
$$;

COMMENT ON FUNCTION pgflow.find_dated_run(text, timestamptz) IS
    'The latest run of a workflow for a date, whether a schedule or a backfill has started it; NULL where there is none.';


CREATE OR REPLACE FUNCTION pgflow.find_free_id(workflow_slug text, logical_date timestamptz) RETURNS uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
DECLARE
    number int := 0;
    derived uuid;
BEGIN
    LOOP
        derived := md5(format('%s/%s/%s', workflow_slug, pgflow.format_date(logical_date), number))::uuid;
        EXIT WHEN NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.id = derived);
        number := number + 1;
    END LOOP;
    RETURN derived;
END
$$;

COMMENT ON FUNCTION pgflow.find_free_id(text, timestamptz) IS
    'The id of the next run of a workflow for a date: two sessions that start it at once find the same. Internal.';


CREATE OR REPLACE FUNCTION pgflow.check_backfill(
    workflow_slug text, dates timestamptz[], payload jsonb, max_active int, on_existing text, data_intervals tstzrange[]
) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    most_dates CONSTANT int := 10000;
    problem CONSTANT text := pgflow.find_json_problem(payload, true);
    wrong timestamptz;
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow.workflows w WHERE w.slug = check_backfill.workflow_slug) THEN
        RAISE EXCEPTION 'unknown workflow "%"', coalesce(workflow_slug, 'NULL') USING ERRCODE = 'no_data_found';
    ELSIF (jsonb_typeof(payload) = 'object') IS NOT TRUE THEN
        RAISE EXCEPTION 'the payload of a backfill of workflow "%" is no object', workflow_slug
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Give a JSON object: each run finds its date in it.';
    ELSIF problem IS NOT NULL THEN
        RAISE EXCEPTION 'the payload of a backfill of workflow "%" %', workflow_slug, problem
            USING ERRCODE = 'invalid_parameter_value', CONSTRAINT = 'json_limits';
    ELSIF max_active IS NULL OR max_active NOT BETWEEN 1 AND 1000 THEN
        RAISE EXCEPTION 'a backfill can''t have % runs under way at once', coalesce(max_active::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'max_active is 1 to 1000.';
    ELSIF on_existing IS NULL OR on_existing NOT IN ('none', 'failed', 'all') THEN
        RAISE EXCEPTION 'on_existing of a backfill can''t be "%"', coalesce(on_existing, 'NULL')
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'none leaves a date that has a run; failed reopens a failed run; all starts another run.';
    ELSIF coalesce(cardinality(dates), 0) = 0 THEN
        RAISE EXCEPTION 'a backfill of workflow "%" has no dates', workflow_slug
            USING ERRCODE = 'invalid_parameter_value';
    ELSIF cardinality(dates) > most_dates THEN
        RAISE EXCEPTION 'a backfill of workflow "%" has % dates, more than %', workflow_slug, cardinality(dates), most_dates
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Start several backfills, one after the other.';
    ELSIF data_intervals IS NOT NULL AND cardinality(data_intervals) <> cardinality(dates) THEN
        RAISE EXCEPTION 'a backfill of workflow "%" has % dates and % data intervals', workflow_slug, cardinality(dates),
                        cardinality(data_intervals)
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Give one for each date, or NULL for all.';
    END IF;
    SELECT d.date INTO wrong FROM unnest(dates) AS d (date)
    WHERE d.date IS NULL OR NOT isfinite(d.date) OR d.date > clock_timestamp() ORDER BY d.date LIMIT 1;
    IF FOUND AND isfinite(wrong) THEN
        RAISE EXCEPTION 'the date % of a backfill of workflow "%" lies in the future', pgflow.format_date(wrong), workflow_slug
            USING ERRCODE = 'invalid_parameter_value', HINT = 'A schedule starts a run when its date has come.';
    ELSIF FOUND THEN
        RAISE EXCEPTION 'a date of a backfill of workflow "%" is %', workflow_slug, coalesce(wrong::text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.check_backfill(text, timestamptz[], jsonb, int, text, tstzrange[]) IS
    'Raises P0002 or 22023 where start_backfill can''t begin. Internal.';


CREATE OR REPLACE FUNCTION pgflow.list_dates(dates timestamptz[], data_intervals tstzrange[])
RETURNS TABLE (logical_date timestamptz, data_interval tstzrange)
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    SELECT d.date, coalesce(d.given, CASE WHEN lag(d.date) OVER earlier IS NOT NULL
                                          THEN tstzrange(lag(d.date) OVER earlier, d.date) END)
    FROM (SELECT DISTINCT ON (u.date) u.date, u.given
          FROM unnest(dates, data_intervals) AS u (date, given) ORDER BY u.date) d
    WINDOW earlier AS (ORDER BY d.date)
    ORDER BY d.date
$$;

COMMENT ON FUNCTION pgflow.list_dates(timestamptz[], tstzrange[]) IS
    'Each date once, in order. The data interval of a date, where none is given, begins with the date before. Internal.';


CREATE OR REPLACE FUNCTION pgflow.preview_backfill(workflow_slug text, dates timestamptz[], on_existing text DEFAULT 'none')
RETURNS TABLE (logical_date timestamptz, action text, run_id uuid, status text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    PERFORM pgflow.check_backfill(workflow_slug, dates, '{}', 1, on_existing, NULL);
    RETURN QUERY
        SELECT d.logical_date, pgflow.decide_date(preview_backfill.on_existing, e.status), e.run_id, e.status
        FROM pgflow.list_dates(dates, NULL) d
        CROSS JOIN LATERAL pgflow.find_dated_run(preview_backfill.workflow_slug, d.logical_date) e
        ORDER BY d.logical_date;
END
$$;

COMMENT ON FUNCTION pgflow.preview_backfill(text, timestamptz[], text) IS
    'What a backfill of these dates would do with each: start a run, reopen its run, or leave its run as it is.';


CREATE OR REPLACE FUNCTION pgflow.list_ended_dates(backfill_id bigint, ended_run uuid)
RETURNS TABLE (logical_date timestamptz, run_id uuid, has_failed boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET cpu_operator_cost = 1000
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_nestloop = on SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF ended_run IS NOT NULL THEN
        RETURN QUERY
            SELECT d.logical_date, d.run_id, r.status = 'failed'
            FROM pgflow.backfill_dates d
            CROSS JOIN LATERAL ( -- else the index of ended runs would be read from end to end, as in end_run
                SELECT r.status FROM pgflow.runs r WHERE r.id = d.run_id OFFSET 0) r
            WHERE d.run_id = ended_run AND d.backfill_id = list_ended_dates.backfill_id AND d.state = 'started'
              AND r.status <> 'pending';
        RETURN;
    END IF;
    RETURN QUERY
        SELECT d.logical_date, d.run_id, coalesce(r.status = 'failed', false)
        FROM pgflow.backfill_dates d
        LEFT JOIN LATERAL (
            SELECT r.status FROM pgflow.runs r WHERE r.id = d.run_id OFFSET 0) r ON true -- as in closes_cycle
        WHERE d.backfill_id = list_ended_dates.backfill_id AND d.state = 'started'
          AND r.status IS DISTINCT FROM 'pending'; -- a run that was deleted has ended before
END
$$;

COMMENT ON FUNCTION pgflow.list_ended_dates(bigint, uuid) IS
    'The dates of a backfill whose run has ended, which is not noted yet; ended_run: looks only at this run. Internal.';


CREATE OR REPLACE FUNCTION pgflow.lock_ended_run(run_id uuid) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
    has_ended boolean;
BEGIN
    SELECT r.status <> 'pending' INTO has_ended FROM pgflow.runs r WHERE r.id = lock_ended_run.run_id FOR SHARE SKIP LOCKED;
    IF FOUND THEN
        RETURN has_ended;
    END IF;
    RETURN NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.id = lock_ended_run.run_id); -- deleted: it had ended before
END
$$;

COMMENT ON FUNCTION pgflow.lock_ended_run(uuid) IS
    'Keeps an ended run from being reopened until the commit; false where it goes on, or another session changes it. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_next_date(backfill_id bigint, newest_first boolean) RETURNS pgflow.backfill_dates
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET cpu_operator_cost = 1000 SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    next_date pgflow.backfill_dates;
BEGIN
    -- Operators are dear here and in its neighbours: the index of the planned dates spares the look at the state, while by
    -- the primary key all dates that were decided before would be read, too.
    IF newest_first THEN
        SELECT * INTO next_date FROM pgflow.backfill_dates d
        WHERE d.backfill_id = find_next_date.backfill_id AND d.state = 'planned' ORDER BY d.logical_date DESC LIMIT 1;
    ELSE
        SELECT * INTO next_date FROM pgflow.backfill_dates d
        WHERE d.backfill_id = find_next_date.backfill_id AND d.state = 'planned' ORDER BY d.logical_date LIMIT 1;
    END IF;
    RETURN next_date;
END
$$;

COMMENT ON FUNCTION pgflow.find_next_date(bigint, boolean) IS
    'The date of a backfill that is next; all NULL where none is planned. Internal.';


CREATE OR REPLACE FUNCTION pgflow.count_started_dates(backfill_id bigint) RETURNS int
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET cpu_operator_cost = 1000 SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN (SELECT count(*) FROM pgflow.backfill_dates d
            WHERE d.backfill_id = count_started_dates.backfill_id AND d.state = 'started');
END
$$;

COMMENT ON FUNCTION pgflow.count_started_dates(bigint) IS 'How many dates of a backfill are under way. Internal.';


CREATE OR REPLACE FUNCTION pgflow.note_date(date pgflow.backfill_dates, state text, run_id uuid, note text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    UPDATE pgflow.backfill_dates d SET state = note_date.state, run_id = note_date.run_id, note = note_date.note
    WHERE d.backfill_id = date.backfill_id AND d.logical_date = date.logical_date
$$;

COMMENT ON FUNCTION pgflow.note_date(pgflow.backfill_dates, text, uuid, text) IS
    'Notes what became of a date of a locked backfill. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_date_lock(workflow_slug text, logical_date timestamptz) RETURNS int[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow, pg_temp
AS $$
    -- 64 locks a workflow, not one a date: all sessions share the memory of locks.
    SELECT ARRAY[hashtext(workflow_slug), hashtext(pgflow.format_date(logical_date)) & 63]
$$;

COMMENT ON FUNCTION pgflow.find_date_lock(text, timestamptz) IS
    'The two keys of the advisory lock of a session that decides this date for a backfill. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_date_holder(backfill_id bigint) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    backfill pgflow.backfills;
    next_date pgflow.backfill_dates;
    key int[];
BEGIN
    SELECT * INTO backfill FROM pgflow.backfills b WHERE b.id = find_date_holder.backfill_id;
    next_date := pgflow.find_next_date(backfill.id, backfill.newest_first);
    IF (backfill.status = 'running' AND next_date.backfill_id IS NOT NULL
        AND pgflow.count_started_dates(backfill.id) < backfill.max_active) IS NOT TRUE THEN
        RETURN NULL;
    END IF;
    key := pgflow.find_date_lock(backfill.workflow_slug, next_date.logical_date);
    RETURN (SELECT format('the session %s of the role %s holds the lock of %s. If it is not another backfill, end it: '
                          'SELECT pg_terminate_backend(%s)', l.pid, quote_ident(a.usename),
                          pgflow.format_date(next_date.logical_date), l.pid)
            FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
            WHERE l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted AND l.pid <> pg_backend_pid()
              AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
              AND l.classid::bigint = (key[1]::bigint & 4294967295) AND l.objid::bigint = key[2] LIMIT 1);
END
$$;

COMMENT ON FUNCTION pgflow.find_date_holder(bigint) IS
    'Which other session keeps the next date of a backfill from being decided, in words; NULL where none does. Any role that '
    'may connect can take such a lock. Internal.';


CREATE OR REPLACE FUNCTION pgflow.start_date(backfill pgflow.backfills, date pgflow.backfill_dates) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    existing pg_catalog.record;
    action pg_catalog.text;
    wanted pgflow.runs;
    run pgflow.runs;
    key int[];
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    -- Of another backfill that may be starting this date, the INSERT of the same id would wait for the transaction.
    key := pgflow.find_date_lock(backfill.workflow_slug, date.logical_date);
    IF NOT pg_catalog.pg_try_advisory_xact_lock(key[1], key[2]) THEN
        RETURN false;
    END IF;
    SELECT * INTO existing FROM pgflow.find_dated_run(backfill.workflow_slug, date.logical_date);
    action := pgflow.decide_date(backfill.on_existing, existing.status);
    IF action OPERATOR(pg_catalog.=) 'leave' THEN
        PERFORM pgflow.note_date(date, 'left', existing.run_id, pg_catalog.format('its run was %s', existing.status));
        RETURN true;
    ELSIF action OPERATOR(pg_catalog.=) 'reopen' THEN
        -- Not waited for: a session that holds this run may wait for another one that this transaction holds.
        PERFORM FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) existing.run_id FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
        BEGIN
            UPDATE pgflow.runs r SET backfill_id = backfill.id WHERE r.id OPERATOR(pg_catalog.=) existing.run_id;
            PERFORM pgflow.reopen_run(existing.run_id);
            PERFORM pgflow.note_date(date, 'started', existing.run_id, NULL);
        EXCEPTION WHEN object_not_in_prerequisite_state THEN -- a step of it was deleted; or another session was faster
            PERFORM pgflow.note_date(date, 'left', existing.run_id, SQLERRM);
        END;
        RETURN true;
    END IF;
    wanted.workflow_slug := backfill.workflow_slug;
    wanted.id := pgflow.find_free_id(backfill.workflow_slug, date.logical_date);
    wanted.payload := pgflow.add_dates(backfill.payload, date.logical_date, date.data_interval);
    wanted.logical_date := date.logical_date;
    wanted.data_interval := date.data_interval;
    wanted.backfill_id := backfill.id;
    run := pgflow.begin_run(wanted);
    IF (run.backfill_id OPERATOR(pg_catalog.=) backfill.id) IS NOT TRUE THEN
        PERFORM pgflow.note_date(date, 'left', run.id, 'another backfill has started its run');
    ELSE
        -- A run whose steps are all skipped has ended already.
        PERFORM pgflow.note_date(date, CASE WHEN run.status OPERATOR(pg_catalog.=) 'pending' THEN 'started' ELSE 'ended' END,
                                 run.id, NULL);
    END IF;
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow.start_date(pgflow.backfills, pgflow.backfill_dates) IS
    'Starts the run of a date of a locked backfill, or reopens it, or leaves it; false where another session holds the '
    'run at this moment, or decides the date for another backfill. Internal.';


CREATE OR REPLACE FUNCTION pgflow.advance_backfill(
    backfill_id bigint, at_most int DEFAULT 1000, ended_run uuid DEFAULT NULL
) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    backfill pgflow.backfills;
    date pgflow.backfill_dates;
    ended pg_catalog.record;
    looked_at int := 0;
BEGIN
    IF pgflow.is_under_policies() OR pg_catalog.row_security_active('pgflow.backfills'::pg_catalog.regclass)
       OR pg_catalog.row_security_active('pgflow.backfill_dates'::pg_catalog.regclass) THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    SELECT * INTO backfill FROM pgflow.backfills b
    WHERE b.id OPERATOR(pg_catalog.=) advance_backfill.backfill_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        PERFORM pgflow.require_backfill(advance_backfill.backfill_id);
        RETURN 0; -- another session advances it at this moment
    END IF;
    FOR ended IN SELECT * FROM pgflow.list_ended_dates(backfill.id, advance_backfill.ended_run) LOOP
        CONTINUE WHEN NOT pgflow.lock_ended_run(ended.run_id); -- it may have been reopened since
        UPDATE pgflow.backfill_dates d SET state = 'ended'
        WHERE d.backfill_id OPERATOR(pg_catalog.=) backfill.id
          AND d.logical_date OPERATOR(pg_catalog.=) ended.logical_date;
        IF ended.has_failed AND backfill.stop_on_failure AND backfill.status OPERATOR(pg_catalog.=) 'running' THEN
            backfill := pgflow.set_backfill(backfill.id, 'paused', pg_catalog.format(
                'run %s of %s has failed', ended.run_id, pgflow.format_date(ended.logical_date)));
        END IF;
    END LOOP;
    WHILE backfill.status OPERATOR(pg_catalog.=) 'running' AND looked_at OPERATOR(pg_catalog.<) at_most
          AND pgflow.count_started_dates(backfill.id) OPERATOR(pg_catalog.<) backfill.max_active LOOP
        date := pgflow.find_next_date(backfill.id, backfill.newest_first);
        EXIT WHEN date.backfill_id IS NULL OR NOT pgflow.start_date(backfill, date);
        looked_at := looked_at OPERATOR(pg_catalog.+) 1;
    END LOOP;
    PERFORM pgflow.finish_backfill(backfill);
    RETURN looked_at;
END
$$;

COMMENT ON FUNCTION pgflow.advance_backfill(bigint, int, uuid) IS
    'Notes which runs of a backfill have ended, and starts planned dates up to max_active; returns how many dates it has '
    'decided, at most so many. 0 where another session does it at this moment. ended_run: looks only at this one.';


CREATE OR REPLACE FUNCTION pgflow.require_backfill(backfill_id bigint) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow.backfills b WHERE b.id = require_backfill.backfill_id) THEN
        RAISE EXCEPTION 'unknown backfill %', coalesce(backfill_id::text, 'NULL') USING ERRCODE = 'no_data_found';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.require_backfill(bigint) IS 'Raises P0002 where there is no such backfill. Internal.';


CREATE OR REPLACE FUNCTION pgflow.set_backfill(backfill_id bigint, status text, note text) RETURNS pgflow.backfills
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    UPDATE pgflow.backfills b SET status = set_backfill.status, note = left(set_backfill.note, 10000)
    WHERE b.id = set_backfill.backfill_id RETURNING b.*
$$;

COMMENT ON FUNCTION pgflow.set_backfill(bigint, text, text) IS
    'Gives a backfill a status, and a note that says why. Internal.';


CREATE OR REPLACE FUNCTION pgflow.finish_backfill(backfill pgflow.backfills) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
BEGIN
    IF backfill.finished_at IS NULL AND pgflow.count_started_dates(backfill.id) = 0
       AND (pgflow.find_next_date(backfill.id, false)).backfill_id IS NULL THEN
        UPDATE pgflow.backfills b
        SET status = CASE b.status WHEN 'cancelled' THEN b.status ELSE 'completed' END, finished_at = clock_timestamp()
        WHERE b.id = backfill.id;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow.finish_backfill(pgflow.backfills) IS
    'Ends a locked backfill that has no date left, planned or under way. Internal.';


CREATE OR REPLACE FUNCTION pgflow.find_backfills_of(run_id uuid) RETURNS bigint[]
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN ARRAY(SELECT d.backfill_id FROM pgflow.backfill_dates d
                 WHERE d.run_id = find_backfills_of.run_id AND d.state = 'started' ORDER BY d.backfill_id);
END
$$;

COMMENT ON FUNCTION pgflow.find_backfills_of(uuid) IS 'The backfills that wait for the end of a run. Internal.';


CREATE OR REPLACE FUNCTION pgflow.continue_backfills(ended_run uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    waiting bigint;
BEGIN
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    -- On inside this function, and once it was cancelled. A statement is cancelled once: a second wait would have no bound.
    IF pg_catalog.current_setting('pgflow.leaves_backfills', true) OPERATOR(pg_catalog.=) 'on' THEN
        RETURN; -- a service does it
    END IF;
    PERFORM pg_catalog.set_config('pgflow.leaves_backfills', 'on', true);
    BEGIN
        FOREACH waiting IN ARRAY pgflow.find_backfills_of(ended_run) LOOP
            PERFORM pgflow.advance_backfill(waiting, 100, ended_run);
        END LOOP;
        BEGIN
            -- A deferred trigger would raise at the commit, and take the run's end back. This is only a trial of it: the
            -- caller's transaction goes on, and what it has deferred stays so.
            SET CONSTRAINTS ALL IMMEDIATE;
            RAISE EXCEPTION USING ERRCODE = 'PGF00', MESSAGE = 'all deferred triggers have passed';
        EXCEPTION WHEN SQLSTATE 'PGF00' THEN
            NULL;
        END;
    -- Whatever keeps the next date from being started, the run has ended. The next look of a service tells why.
    EXCEPTION
        WHEN query_canceled THEN
            RETURN;
        WHEN OTHERS OR assert_failure THEN
            NULL;
    END;
    PERFORM pg_catalog.set_config('pgflow.leaves_backfills', 'off', true);
END
$$;

COMMENT ON FUNCTION pgflow.continue_backfills(uuid) IS
    'advance_backfill for each backfill that waits for the end of a run, in the transaction that ends it. An error or a '
    'cancelled statement changes nothing. After the latter, further ends of this transaction leave it to services. Internal.';


CREATE OR REPLACE FUNCTION pgflow.await_again(reopened_run uuid) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
    UPDATE pgflow.backfill_dates d SET state = 'started' WHERE d.run_id = reopened_run AND d.state = 'ended'
$$;

COMMENT ON FUNCTION pgflow.await_again(uuid) IS
    'A run of a backfill was reopened: it counts as under way again. Internal.';


CREATE OR REPLACE FUNCTION pgflow.start_backfill(
    workflow_slug text, dates timestamptz[], payload jsonb DEFAULT '{}', max_active int DEFAULT 1,
    on_existing text DEFAULT 'none', newest_first boolean DEFAULT false, stop_on_failure boolean DEFAULT false,
    data_intervals tstzrange[] DEFAULT NULL, schedule text DEFAULT NULL
) RETURNS bigint
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    started bigint;
BEGIN
    IF pgflow.is_under_policies() OR pg_catalog.row_security_active('pgflow.backfills'::pg_catalog.regclass)
       OR pg_catalog.row_security_active('pgflow.backfill_dates'::pg_catalog.regclass) THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    PERFORM pgflow.check_backfill(workflow_slug, dates, payload, max_active, on_existing, data_intervals);
    INSERT INTO pgflow.backfills (workflow_slug, payload, max_active, on_existing, newest_first, stop_on_failure, schedule)
    VALUES (start_backfill.workflow_slug, start_backfill.payload, start_backfill.max_active, start_backfill.on_existing,
            coalesce(start_backfill.newest_first, false), coalesce(start_backfill.stop_on_failure, false),
            start_backfill.schedule)
    RETURNING id INTO started;
    INSERT INTO pgflow.backfill_dates (backfill_id, logical_date, data_interval)
    SELECT started, d.logical_date, d.data_interval FROM pgflow.list_dates(dates, data_intervals) d;
    PERFORM pgflow.advance_backfill(started);
    RETURN started;
END
$$;

COMMENT ON FUNCTION pgflow.start_backfill(text, timestamptz[], jsonb, int, text, boolean, boolean, tstzrange[], text) IS
    'Plans a run of a workflow for each of these dates, starts the first ones, and returns the id of the backfill. A date '
    'that has a run: on_existing none leaves it, failed reopens it if it has failed, all starts another one if it has ended.';


CREATE OR REPLACE FUNCTION pgflow.pause_backfill(backfill_id bigint, reason text DEFAULT NULL) RETURNS pgflow.backfills
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    backfill pgflow.backfills;
BEGIN
    PERFORM pgflow.require_backfill(backfill_id);
    SELECT * INTO backfill FROM pgflow.backfills b WHERE b.id = pause_backfill.backfill_id FOR NO KEY UPDATE;
    IF backfill.status = 'paused' THEN
        RETURN backfill;
    ELSIF backfill.status <> 'running' THEN
        RAISE EXCEPTION 'backfill % can''t be paused: it is %', backfill_id, backfill.status
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'backfills_status';
    END IF;
    RETURN pgflow.set_backfill(backfill_id, 'paused', coalesce(reason, 'as requested'));
END
$$;

COMMENT ON FUNCTION pgflow.pause_backfill(bigint, text) IS
    'Starts no further date of a backfill; the runs that are under way go on. A paused one stays as it is.';


CREATE OR REPLACE FUNCTION pgflow.resume_backfill(backfill_id bigint) RETURNS pgflow.backfills
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    backfill pgflow.backfills;
BEGIN
    IF pgflow.is_under_policies() OR pg_catalog.row_security_active('pgflow.backfills'::pg_catalog.regclass)
       OR pg_catalog.row_security_active('pgflow.backfill_dates'::pg_catalog.regclass) THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    PERFORM pgflow.require_backfill(resume_backfill.backfill_id);
    SELECT * INTO backfill FROM pgflow.backfills b
    WHERE b.id OPERATOR(pg_catalog.=) resume_backfill.backfill_id FOR NO KEY UPDATE;
    IF backfill.status OPERATOR(pg_catalog.=) 'running' THEN
        RETURN backfill;
    ELSIF backfill.status OPERATOR(pg_catalog.<>) 'paused' THEN
        RAISE EXCEPTION 'backfill % can''t go on: it is %', backfill.id, backfill.status
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'backfills_status', HINT = 'Start another backfill.';
    END IF;
    PERFORM pgflow.set_backfill(backfill.id, 'running', NULL);
    PERFORM pgflow.advance_backfill(backfill.id);
    SELECT * INTO backfill FROM pgflow.backfills b WHERE b.id OPERATOR(pg_catalog.=) resume_backfill.backfill_id;
    RETURN backfill;
END
$$;

COMMENT ON FUNCTION pgflow.resume_backfill(bigint) IS
    'Lets a paused backfill go on with its next dates. A running one stays as it is.';


CREATE OR REPLACE FUNCTION pgflow.cancel_backfill(
    backfill_id bigint, cancel_runs boolean DEFAULT false, reason text DEFAULT NULL
) RETURNS pgflow.backfills
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    backfill pgflow.backfills;
    under_way pg_catalog.uuid;
BEGIN
    IF pgflow.is_under_policies() OR pg_catalog.row_security_active('pgflow.backfills'::pg_catalog.regclass)
       OR pg_catalog.row_security_active('pgflow.backfill_dates'::pg_catalog.regclass) THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    PERFORM pgflow.require_backfill(cancel_backfill.backfill_id);
    SELECT * INTO backfill FROM pgflow.backfills b
    WHERE b.id OPERATOR(pg_catalog.=) cancel_backfill.backfill_id FOR NO KEY UPDATE;
    IF backfill.status OPERATOR(pg_catalog.=) 'completed' THEN
        RAISE EXCEPTION 'backfill % can''t be cancelled: it is completed', backfill.id
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'backfills_status';
    ELSIF backfill.status OPERATOR(pg_catalog.<>) 'cancelled' THEN
        backfill := pgflow.set_backfill(backfill.id, 'cancelled', coalesce(cancel_backfill.reason, 'as requested'));
        UPDATE pgflow.backfill_dates d SET state = 'left', note = 'the backfill was cancelled'
        WHERE d.backfill_id OPERATOR(pg_catalog.=) backfill.id AND d.state OPERATOR(pg_catalog.=) 'planned';
    END IF;
    IF cancel_backfill.cancel_runs THEN
        FOR under_way IN
            SELECT d.run_id FROM pgflow.backfill_dates d
            WHERE d.backfill_id OPERATOR(pg_catalog.=) backfill.id AND d.state OPERATOR(pg_catalog.=) 'started'
            ORDER BY d.run_id
        LOOP
            PERFORM pgflow.cancel_run(r.id, pg_catalog.format('backfill %s was cancelled: %s', backfill.id, backfill.note))
            FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) under_way;
        END LOOP;
    END IF;
    PERFORM pgflow.advance_backfill(backfill.id); -- notes what has ended
    SELECT * INTO backfill FROM pgflow.backfills b WHERE b.id OPERATOR(pg_catalog.=) cancel_backfill.backfill_id;
    RETURN backfill;
END
$$;

COMMENT ON FUNCTION pgflow.cancel_backfill(bigint, boolean, text) IS
    'Leaves the planned dates of a backfill for good. Its runs that are under way go on, or end as cancelled (cancel_runs). '
    'A cancelled one stays as it is.';


------------------------------------------------------------------------------------------------------------
-- Rights: only the owner calls these until a role is granted to (the README says how)
------------------------------------------------------------------------------------------------------------

DO $rights$
BEGIN
    -- Version 1 left the functions to PUBLIC where its owner had default privileges.
    PERFORM pgflow.close_schema('pgflow', also_known => current_setting('pgflow.former_version')::int < 2);
    PERFORM pgflow.hand_on_rights('pgflow.waiting_steps', '{SELECT,INSERT,UPDATE,DELETE}', 'pgflow.undone_steps',
                                  'pgflow.step_maps', 'pgflow.step_items', 'pgflow.child_requests');
    PERFORM pgflow.hand_on_rights('pgflow.waiting_steps', '{SELECT,INSERT,UPDATE}', 'pgflow.backfills', 'pgflow.backfill_dates');
END
$rights$;

COMMIT;
