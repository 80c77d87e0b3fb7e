-- pgflow_prefect: what the adapter between pgflow and Prefect keeps for itself.
--
-- Which flow run may write for a run and until when, which task run does a step, who does its work, which workflows
-- workers and bridges serve. Needs pgflow.sql, changes nothing in it. Run definitions.sql, recording.sql, schedules.sql and
-- runs.sql after it.
-- psql -d DATABASE -f pgflow_prefect.sql; one transaction, safe to run again. Upgrading, it builds the new keys of
-- three tables and locks them for that long: stop workers and bridges before. `pgflow-prefect init` does so without.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;
SET LOCAL pgflow.script_version = 6;

DO $guard$
DECLARE
    former_version int := 0;
BEGIN
    IF to_regprocedure('pgflow.lock_schema(text)') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is missing or old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0';
    PERFORM pgflow.lock_schema('pgflow_prefect');
    IF to_regprocedure('pgflow_prefect.adapter_version()') IS NOT NULL THEN
        EXECUTE 'SELECT pgflow_prefect.adapter_version()' INTO former_version;
    END IF;
    IF former_version > 10 THEN
        RAISE EXCEPTION 'the schema pgflow_prefect has version %, and this script installs version 10', former_version
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = 'Upgrade the program: pip install --upgrade pgflow-prefect';
    END IF;
    PERFORM set_config('pgflow.former_version', former_version::text, true);
END
$guard$;

-- This database, among those that share a Prefect server: what was made there for its workflows carries this id.
CREATE TABLE IF NOT EXISTS pgflow_prefect.installation (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    is_only_row BOOLEAN NOT NULL DEFAULT true UNIQUE CHECK (is_only_row)
);

CREATE OR REPLACE FUNCTION pgflow_prefect.replace_installation() RETURNS trigger
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    DELETE FROM pgflow_prefect.installation; -- the one that this script made: a dump of data brings its own
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.replace_installation() IS
    'Lets the data of another database be restored here, its installation with it.';

DO $installation$
DECLARE
    state "char";
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow_prefect.installation) THEN
        INSERT INTO pgflow_prefect.installation DEFAULT VALUES;
    END IF;
    SELECT tgenabled INTO state FROM pg_catalog.pg_trigger
    WHERE tgrelid = 'pgflow_prefect.installation'::regclass AND tgname = 'replace_installation';
    IF NOT FOUND THEN
        CREATE TRIGGER replace_installation BEFORE INSERT ON pgflow_prefect.installation
            FOR EACH ROW EXECUTE FUNCTION pgflow_prefect.replace_installation();
    END IF;
    IF coalesce(state, 'O') = 'O' THEN -- disabled: an administrator's decision
        ALTER TABLE pgflow_prefect.installation ENABLE ALWAYS TRIGGER replace_installation;
    END IF;
END
$installation$;

-- The latest signs of life that services of this database gave in Prefect. There is no row before the first use.
CREATE TABLE IF NOT EXISTS pgflow_prefect.heartbeats (
    is_only_row BOOLEAN PRIMARY KEY DEFAULT true CHECK (is_only_row),
    beats UUID[] NOT NULL DEFAULT '{}', -- the newest first
    beat_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

-- A run's owner: only it may write for the run, in the run's epoch. A row of an older epoch is history.
-- lease_until has three special values. -infinity: the owner has released the run. 1970: the owner's process is dead.
-- infinity: the owner's flow run waits in Prefect's queue.
CREATE TABLE IF NOT EXISTS pgflow_prefect.owners (
    run_id UUID PRIMARY KEY REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    epoch INT NOT NULL,
    flow_run_id UUID,              -- NULL until Prefect has created it; of version 8: Prefect is not told of the run
    held_by TEXT NOT NULL,         -- host and process, for people
    lease_until TIMESTAMPTZ NOT NULL,
    remaining INT,                 -- of the run's steps when it was taken: fewer now mean progress
    recoveries INT NOT NULL DEFAULT 0,
    stale_writes BIGINT NOT NULL DEFAULT 0, -- refused claims and reports of former owners
    settled BOOLEAN NOT NULL DEFAULT false, -- the run has ended, and Prefect agrees with its rows
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 70);

-- The workflows whose runs workers and bridges take, if the runs began after `since`.
CREATE TABLE IF NOT EXISTS pgflow_prefect.enabled_workflows (
    workflow_slug TEXT PRIMARY KEY REFERENCES pgflow.workflows (slug) ON UPDATE CASCADE ON DELETE CASCADE,
    enabled BOOLEAN NOT NULL DEFAULT true,
    since TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

-- A run's flow runs, in the epochs in which they took it.
CREATE TABLE IF NOT EXISTS pgflow_prefect.flow_runs (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    epoch INT NOT NULL,
    flow_run_id UUID NOT NULL,
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, epoch)
);

-- A step's latest task run, and its state in Prefect.
CREATE TABLE IF NOT EXISTS pgflow_prefect.task_runs (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    task_run_id UUID NOT NULL,
    state_name TEXT NOT NULL,
    message TEXT,                  -- of the latest failed attempt, before a retry
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug)
);

-- The handlers of steps. A row wins over the file of handlers, and takes effect at the next claim.
CREATE TABLE IF NOT EXISTS pgflow_prefect.bindings (
    workflow_slug TEXT NOT NULL,
    step_slug TEXT NOT NULL,
    kind TEXT NOT NULL,
    target TEXT,                   -- a function, the URL of an endpoint or a queue, or a name of a worker's settings
    options JSONB NOT NULL DEFAULT '{}',
    bound_by TEXT,                 -- this role must have the right to execute the target; NULL: from before version 6
    PRIMARY KEY (workflow_slug, step_slug),
    FOREIGN KEY (workflow_slug, step_slug) REFERENCES pgflow.steps (workflow_slug, slug)
        ON UPDATE CASCADE ON DELETE CASCADE,
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
    workflow_slug TEXT NOT NULL REFERENCES pgflow.workflows (slug) ON UPDATE CASCADE ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    before JSONB,
    after JSONB,
    changed_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    changed_by TEXT NOT NULL DEFAULT session_user,
    undone_at TIMESTAMPTZ,
    undone_by TEXT
);

-- Steps that an external worker has claimed by claim_external_step. No other worker begins them before claimed_until.
CREATE TABLE IF NOT EXISTS pgflow_prefect.external_claims (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    attempt INT NOT NULL,          -- a row of an earlier attempt is history
    claimed_until TIMESTAMPTZ NOT NULL,
    claimed_by TEXT NOT NULL DEFAULT session_user,
    PRIMARY KEY (run_id, step_slug)
);

-- Runs that could not be taken, for example because your trigger raised an error. Workers and bridges take other runs
-- first, and try such a run again at next_try. A row of an earlier epoch is history.
CREATE TABLE IF NOT EXISTS pgflow_prefect.set_aside_runs (
    run_id UUID PRIMARY KEY REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    epoch INT NOT NULL,
    reason TEXT NOT NULL,
    tries INT NOT NULL DEFAULT 1,  -- each try doubles the pause, up to five minutes
    next_try TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp() + interval '1 second',
    step_slug TEXT                 -- the step whose claim or end is refused; NULL: the run could not be taken
);

-- Comparisons of a handler's result with an external worker's result, without the results.
CREATE TABLE IF NOT EXISTS pgflow_prefect.shadow_reports (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    workflow_slug TEXT NOT NULL,
    step_slug TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('same', 'different', 'failed')),
    details TEXT[] NOT NULL DEFAULT '{}', -- where the results differ, or why the handler failed
    seconds DOUBLE PRECISION NOT NULL,    -- time that the handler took
    reported_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug)
);

-- Completed steps whose results later runs may take over, by a hash of the key that a function of the user returns. The
-- result itself stays in the step's state. With another result of the step, a row means nothing. It goes with the row of
-- the owner, which goes with the run: a reference to the run itself would have an upgrade wait for claims that wait.
CREATE TABLE IF NOT EXISTS pgflow_prefect.cached_results (
    run_id UUID NOT NULL REFERENCES pgflow_prefect.owners (run_id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    task_index INT NOT NULL DEFAULT 0,
    cache_key TEXT NOT NULL CHECK (cache_key ~ '^[0-9a-f]{64}$'),
    finished_at TIMESTAMPTZ NOT NULL, -- of the step's state that was meant
    expires_at TIMESTAMPTZ,        -- NULL: never
    PRIMARY KEY (run_id, step_slug, task_index)
);

-- The workflows whose runs Airflow executes. A workflow has the id of its DAG. One service follows each of them, for as
-- long as its lease holds.
CREATE TABLE IF NOT EXISTS pgflow_prefect.mirrors (
    workflow_slug TEXT PRIMARY KEY REFERENCES pgflow.workflows (slug) ON UPDATE CASCADE ON DELETE CASCADE,
    epoch INT NOT NULL DEFAULT 0,  -- grows with each change of the service
    holder UUID,                   -- the service
    held_by TEXT,                  -- its host and process, for people
    lease_until TIMESTAMPTZ NOT NULL DEFAULT '-infinity',
    read_to BIGINT,                -- Airflow's runs up to this id were looked at; NULL: none was yet
    looked_at TIMESTAMPTZ,         -- when the latest look was finished
    since TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
);

-- Runs of Airflow that have rows here. As in cached_results, a row goes with that of the owner.
CREATE TABLE IF NOT EXISTS pgflow_prefect.mirrored_runs (
    run_id UUID PRIMARY KEY REFERENCES pgflow_prefect.owners (run_id) ON DELETE CASCADE,
    workflow_slug TEXT NOT NULL,
    source_id BIGINT NOT NULL,     -- dag_run.id
    source_run_id TEXT NOT NULL,   -- dag_run.run_id
    source_mark TEXT NOT NULL,     -- changes when Airflow's run does
    shown BOOLEAN NOT NULL DEFAULT false, -- Prefect has a flow run of it
    executed_here BOOLEAN NOT NULL DEFAULT false, -- a user has made it a run of this database: no mirror moves it
    imported BOOLEAN NOT NULL DEFAULT false, -- it had ended when it was written: Prefect is told of it on request only
    notes JSONB NOT NULL DEFAULT '{}', -- what is not as in Airflow, by step; '' for the run
    mirrored_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (workflow_slug, source_run_id)
);

DO $columns$
DECLARE
    restore text;
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_constraint
               WHERE conrelid = 'pgflow_prefect.bindings'::regclass AND conname = 'bindings_secret'
                 AND pg_catalog.pg_get_constraintdef(oid) NOT LIKE '%pwd%') THEN
        ALTER TABLE pgflow_prefect.bindings DROP CONSTRAINT bindings_secret; -- the old check let code, auth and pwd pass
        ALTER TABLE pgflow_prefect.bindings ADD CONSTRAINT bindings_secret CHECK (
            kind NOT IN ('http', 'queue')
            OR (target !~ '^[^/?#]*//[^/?#]*@'
                AND target !~* '[?&;#]([a-z0-9_-]*(key|token|secret|password|passwd|signature|sig|pwd|jwt|credentials?)'
                '|([a-z0-9_-]*[_-])?(o?auth|pass|sas)|((access|api|auth|function|secret)[_-]?)?code)=')) NOT VALID;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_constraint
                   WHERE conrelid = 'pgflow_prefect.bindings'::regclass AND conname = 'bindings_name') THEN
        ALTER TABLE pgflow_prefect.bindings DROP CONSTRAINT bindings_kind, DROP CONSTRAINT bindings_target; -- new kinds
        ALTER TABLE pgflow_prefect.bindings
            ADD CONSTRAINT bindings_kind CHECK (
                kind IN ('python', 'external', 'sql', 'http', 'queue', 'command', 'work-pool')),
            ADD CONSTRAINT bindings_target CHECK ((kind NOT IN ('python', 'external')) = (target IS NOT NULL)),
            ADD CONSTRAINT bindings_name CHECK (
                kind NOT IN ('command', 'work-pool') OR target ~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$');
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.installation'::regclass AND attname = 'stamp') THEN
        ALTER TABLE pgflow_prefect.installation
            ADD COLUMN stamp TEXT, -- identifies the database of the row: in a copy of the database, it does not fit
            ADD COLUMN former_stamps TEXT[] NOT NULL DEFAULT '{}'; -- the stamps before moves
        IF to_regprocedure('pgflow_prefect.adapter_version()') IS NOT NULL THEN -- an older version may be in use
            INSERT INTO pgflow_prefect.heartbeats DEFAULT VALUES ON CONFLICT DO NOTHING;
        END IF;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.set_aside_runs'::regclass AND attname = 'step_slug') THEN
        ALTER TABLE pgflow_prefect.set_aside_runs ADD COLUMN step_slug TEXT;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.owners'::regclass AND attname = 'given_up_in') THEN
        ALTER TABLE pgflow_prefect.owners ADD COLUMN given_up_in INT; -- the epoch that failed: its owners vanished
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.owners'::regclass AND attname = 'items_ended') THEN
        -- Items of the run's maps that had ended when it was taken: more now mean progress.
        ALTER TABLE pgflow_prefect.owners ADD COLUMN items_ended INT NOT NULL DEFAULT 0;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.task_runs'::regclass AND attname = 'handler') THEN
        ALTER TABLE pgflow_prefect.task_runs ADD COLUMN handler TEXT; -- the step's handler, for people
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.external_claims'::regclass AND attname = 'holder') THEN
        ALTER TABLE pgflow_prefect.external_claims
            ADD COLUMN holder UUID,      -- the process of a work pool that does the step
            ADD COLUMN failure TEXT,     -- why its attempt has failed: the owner of the run decides about another one
            ADD COLUMN is_final BOOLEAN; -- another attempt would only repeat the failure
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.task_runs'::regclass AND attname = 'attempt') THEN
        -- The attempt that was claimed for this handler. A message about another attempt is refused.
        ALTER TABLE pgflow_prefect.task_runs ADD COLUMN attempt INT;
        UPDATE pgflow_prefect.task_runs t SET attempt = s.attempts -- for the messages on queues now
        FROM pgflow.step_states s
        WHERE t.state_name = 'Deferred' AND s.run_id = t.run_id AND s.step_slug = t.step_slug;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.owners'::regclass AND attname = 'holder') THEN
        -- The identity of the owner's process on its machine, and the epoch of this note. NULL: not known.
        ALTER TABLE pgflow_prefect.owners ADD COLUMN holder JSONB;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.task_runs'::regclass AND attname = 'first_claimed_at') THEN
        -- Two statements, because adding a column with a volatile default rewrites the whole table.
        ALTER TABLE pgflow_prefect.task_runs ADD COLUMN first_claimed_at TIMESTAMPTZ;
        ALTER TABLE pgflow_prefect.task_runs ALTER COLUMN first_claimed_at SET DEFAULT clock_timestamp();
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.bindings'::regclass AND attname = 'bound_by') THEN
        ALTER TABLE pgflow_prefect.bindings ADD COLUMN bound_by TEXT;
        UPDATE pgflow_prefect.bindings b SET bound_by = (
            SELECT c.changed_by FROM pgflow_prefect.binding_changes c
            WHERE c.workflow_slug = b.workflow_slug AND c.step_slug = b.step_slug AND c.undone_at IS NULL
            ORDER BY c.id DESC LIMIT 1);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.enabled_workflows'::regclass AND attname = 'first_enabled') THEN
        ALTER TABLE pgflow_prefect.enabled_workflows
            ADD COLUMN first_enabled TIMESTAMPTZ; -- `since` is the last time; NULL: never enabled
        UPDATE pgflow_prefect.enabled_workflows SET first_enabled = since;
        ALTER TABLE pgflow_prefect.owners
            ADD COLUMN adopted BOOLEAN NOT NULL DEFAULT false; -- a service took it, although it is older
        -- Services of this version take the same runs as those of the former version.
        UPDATE pgflow_prefect.owners o SET adopted = true
        FROM pgflow.runs r JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug
        WHERE r.id = o.run_id AND r.status = 'pending';
    END IF;
    IF current_setting('pgflow.former_version')::int BETWEEN 1 AND 6
       AND EXISTS (SELECT FROM pgflow_prefect.owners o JOIN pgflow.runs r ON r.id = o.run_id AND r.epoch = o.given_up_in
                   WHERE r.ended_as = 'cancelled') THEN
        -- Version 6 gave up a run by cancel_run. The upgrade of pgflow.sql can't tell it from a user's cancellation.
        restore := pgflow.pause_reactions('pgflow.runs', 'pgflow.step_states');
        UPDATE pgflow.step_states s SET ended_as = NULL
        FROM pgflow_prefect.owners o JOIN pgflow.runs r ON r.id = o.run_id AND r.epoch = o.given_up_in
        WHERE r.ended_as = 'cancelled' AND s.run_id = r.id AND s.ended_as = 'cancelled';
        UPDATE pgflow.runs r SET ended_as = NULL
        FROM pgflow_prefect.owners o
        WHERE o.run_id = r.id AND o.given_up_in = r.epoch AND r.ended_as = 'cancelled';
        EXECUTE restore;
    END IF;
    IF to_regprocedure('pgflow_prefect.claim_step(uuid, text, int, uuid, text[], boolean)') IS NOT NULL THEN
        DROP FUNCTION pgflow_prefect.claim_step(uuid, text, int, uuid, text[], boolean); -- version 2 knew no bindings
    END IF;
    PERFORM pgflow.reserve_pages('pgflow_prefect', ARRAY[
        'owners', 'enabled_workflows', 'flow_runs', 'task_runs', 'bindings', 'external_claims', 'set_aside_runs',
        'shadow_reports', 'cached_results', 'mirrors', 'mirrored_runs']);
    IF to_regclass('pgflow_prefect.cached_results_by_key') IS NULL THEN
        CREATE INDEX cached_results_by_key ON pgflow_prefect.cached_results (cache_key, finished_at);
    END IF;
    IF to_regclass('pgflow_prefect.binding_changes_by_step') IS NULL THEN
        CREATE INDEX binding_changes_by_step ON pgflow_prefect.binding_changes (workflow_slug, step_slug, id);
    END IF;
    IF to_regclass('pgflow_prefect.shadow_reports_by_step') IS NULL THEN
        CREATE INDEX shadow_reports_by_step ON pgflow_prefect.shadow_reports (workflow_slug, step_slug, reported_at);
    END IF;
    IF to_regclass('pgflow_prefect.flow_runs_by_id') IS NULL THEN
        CREATE INDEX flow_runs_by_id ON pgflow_prefect.flow_runs (flow_run_id);
    END IF;
    IF to_regclass('pgflow_prefect.mirrored_runs_by_source') IS NULL THEN
        CREATE INDEX mirrored_runs_by_source ON pgflow_prefect.mirrored_runs (workflow_slug, source_id);
        CREATE INDEX mirrored_runs_unshown ON pgflow_prefect.mirrored_runs (workflow_slug, source_id)
            WHERE NOT shown AND NOT imported;
    END IF;
    IF to_regclass('pgflow_prefect.owners_unsettled') IS NULL THEN
        CREATE INDEX owners_unsettled ON pgflow_prefect.owners (run_id) WHERE NOT settled;
    END IF;
    IF to_regprocedure('pgflow_prefect.take_run(uuid, uuid)') IS NOT NULL THEN
        DROP FUNCTION pgflow_prefect.take_run(uuid, uuid); -- version 1 knew no leases
    END IF;
    IF to_regprocedure('pgflow_prefect.take_runs(text[], int, boolean, text, double precision, int)') IS NOT NULL THEN
        -- 5 did not know which runs the caller executes
        DROP FUNCTION pgflow_prefect.take_runs(text[], int, boolean, text, double precision, int);
    END IF;
    IF to_regprocedure('pgflow_prefect.choose_runs(text, int, boolean, double precision, uuid[])') IS NOT NULL THEN
        DROP FUNCTION pgflow_prefect.choose_runs(text, int, boolean, double precision, uuid[]); -- it read what was taken
    END IF;
    IF to_regprocedure('pgflow_prefect.choose_runs(text, boolean, int, boolean, double precision, uuid[])') IS NOT NULL THEN
        DROP FUNCTION pgflow_prefect.choose_runs(text, boolean, int, boolean, double precision, uuid[]); -- no backfills
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_class
                   WHERE oid = 'pgflow_prefect.task_runs'::regclass AND 'fillfactor=70' = ANY (reloptions)) THEN
        ALTER TABLE pgflow_prefect.task_runs SET (fillfactor = 70); -- a state's change is an update in place
    END IF;
END
$columns$;

-- What a function returns can't be changed in place: those that did not tell of skips or dates go.
DO $skips$
DECLARE
    former record;
BEGIN
    FOR former IN
        SELECT p.oid::regprocedure AS signature
        FROM (VALUES ('claim_step(uuid,text,int,int,uuid,text[],boolean,text,boolean,text)', 'logical_date'),
                     ('perform_tasks(jsonb)', 'logical_date'),
                     ('read_input(uuid,text,int,text[])', 'logical_date'),
                     ('read_run(uuid,double precision,boolean)', 'logical_date'),
                     ('list_runs(text,text,text,timestamptz,int,double precision,boolean)', 'logical_date'),
                     ('create_run(text,jsonb,uuid,uuid,text,double precision,int)', 'logical_date'),
                     ('take_runs(text[],int,boolean,text,double precision,int,uuid[],boolean)', 'parent_step_slug'),
                     ('choose_runs(text,boolean,int,boolean,double precision,uuid[],boolean)', 'parent_step_slug'),
                     ('list_step_states(uuid)', 'skip_message'), ('list_step_ends(uuid,text[])', 'skip_message'),
                     ('complete_step(uuid,text,int,jsonb,int,int,uuid)', 'outcome'),
                     ('complete_pending_step(uuid,text,int,jsonb,int,int,uuid)', 'outcome'),
                     ('report_completion(uuid,text,int,jsonb,int)', 'outcome')) AS known (signature, lacking)
        JOIN pg_catalog.pg_proc p ON p.oid = to_regprocedure('pgflow_prefect.' || known.signature)
        WHERE known.lacking <> ALL (p.proargnames)
    LOOP
        EXECUTE format('DROP FUNCTION %s', former.signature);
    END LOOP;
END
$skips$;

-- Version 7: a task is addressed by its step and its index; a plain step has one task, index 0.
DO $task_keys$
DECLARE
    keyed text;
BEGIN
    FOREACH keyed IN ARRAY ARRAY['task_runs', 'external_claims', 'shadow_reports'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                       WHERE attrelid = ('pgflow_prefect.' || keyed)::regclass AND attname = 'task_index') THEN
            EXECUTE format('ALTER TABLE pgflow_prefect.%I ADD COLUMN task_index INT NOT NULL DEFAULT 0', keyed);
        END IF;
    END LOOP;
END
$task_keys$;

-- The columns of a table's primary key are its task's: run_id, step_slug and task_index.
CREATE OR REPLACE FUNCTION pgflow_prefect.is_keyed_by_task(table_name text) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM pg_constraint c
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey) AND a.attname = 'task_index'
        WHERE c.conrelid = to_regclass(format('pgflow_prefect.%I', table_name)) AND c.contype = 'p')
$$;

COMMENT ON FUNCTION pgflow_prefect.is_keyed_by_task(text) IS
    'True for a table whose primary key has task_index in it; NULL and false before its upgrade. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.key_by_task(table_name text) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    prepared CONSTANT text := table_name || '_by_task'; -- built by `init` before, without a lock
BEGIN
    IF pgflow_prefect.is_keyed_by_task(table_name) THEN
        RETURN;
    END IF;
    EXECUTE format('LOCK TABLE pgflow_prefect.%I IN ACCESS EXCLUSIVE MODE', table_name);
    IF pgflow_prefect.is_keyed_by_task(table_name) THEN
        RETURN; -- another session was faster
    END IF;
    IF NOT EXISTS (SELECT FROM pg_index
                   WHERE indexrelid = to_regclass(format('pgflow_prefect.%I', prepared)) AND indisvalid) THEN
        EXECUTE format('DROP INDEX IF EXISTS pgflow_prefect.%I', prepared);
        EXECUTE format('CREATE UNIQUE INDEX %I ON pgflow_prefect.%I (run_id, step_slug, task_index)',
                       prepared, table_name);
    END IF;
    EXECUTE format('ALTER TABLE pgflow_prefect.%I DROP CONSTRAINT %I, ADD CONSTRAINT %2$I PRIMARY KEY USING INDEX %3$I',
                   table_name, table_name || '_pkey', prepared);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.key_by_task(text) IS
    'Gives a table the primary key (run_id, step_slug, task_index) in place of (run_id, step_slug). Internal.';


DO $task_keys$
BEGIN
    -- `init` does this after the script, table by table. It waits until no statement of a former version runs, because
    -- such a statement needs the former key. A pasted script does everything in one transaction. It locks the tables
    -- while it builds their keys.
    IF coalesce(current_setting('pgflow.keys_follow', true), '') <> 'on' THEN
        PERFORM pgflow_prefect.key_by_task(keyed) FROM unnest(ARRAY['task_runs', 'external_claims', 'shadow_reports'])
            AS keyed;
    END IF;
END
$task_keys$;


------------------------------------------------------------------------------------------------------------
-- The installation. A copy of a database has the id of the original: it must not touch what that shows in Prefect.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.current_stamp() RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    cluster text := '?';
BEGIN
    BEGIN
        SELECT c.system_identifier INTO cluster FROM pg_control_system() c;
    EXCEPTION WHEN insufficient_privilege OR undefined_function THEN
        NULL; -- the database's oid is enough then
    END;
    RETURN cluster || '/' || (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
END
$$;

COMMENT ON FUNCTION pgflow_prefect.current_stamp() IS
    'Tells this database from a restored or cloned one, by the cluster''s system identifier and the database''s '
    'oid.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_same_stamp(stamp text, other text) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT split_part(stamp, '/', 2) = split_part(other, '/', 2)
       AND (split_part(stamp, '/', 1) = split_part(other, '/', 1) OR '?' IN (split_part(stamp, '/', 1), split_part(other, '/', 1)))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_same_stamp(text, text) IS
    'True if two stamps are of one database. A cluster that a role could not read (?) decides nothing.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_installation()
RETURNS TABLE (id uuid, stamp text, current_stamp text, former_stamps text[], fits boolean, is_used boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT i.id, i.stamp, c.stamp, i.former_stamps, coalesce(pgflow_prefect.is_same_stamp(i.stamp, c.stamp), false),
           EXISTS (SELECT FROM pgflow_prefect.heartbeats)
    FROM pgflow_prefect.installation i, pgflow_prefect.current_stamp() AS c (stamp)
$$;

COMMENT ON FUNCTION pgflow_prefect.read_installation() IS
    'This installation. fits: its stamp is of this database, which is no copy. is_used: it has written to '
    'Prefect.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_installation() RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    IF EXISTS (SELECT FROM pgflow_prefect.heartbeats)
       OR NOT has_table_privilege('pgflow_prefect.installation', 'UPDATE') THEN -- the owner's `init` does it, then
        RETURN false;
    END IF;
    UPDATE pgflow_prefect.installation i SET id = gen_random_uuid(), stamp = pgflow_prefect.current_stamp()
    WHERE NOT pgflow_prefect.is_same_stamp(i.stamp, pgflow_prefect.current_stamp());
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_installation() IS
    'Gives a copy an id of its own if the original was never used with Prefect, such as a template. Otherwise '
    'changes nothing.';


CREATE OR REPLACE FUNCTION pgflow_prefect.new_installation() RETURNS uuid
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    new_id uuid;
    mirrored pgflow_prefect.mirrored_runs[] := ARRAY(SELECT m FROM pgflow_prefect.mirrored_runs m);
BEGIN
    UPDATE pgflow_prefect.installation
    SET id = gen_random_uuid(), stamp = pgflow_prefect.current_stamp(), former_stamps = '{}' RETURNING id INTO new_id;
    -- Flow runs, task runs and claims belong to the original. Its pending runs are older runs here: --adopt takes them.
    TRUNCATE pgflow_prefect.owners, pgflow_prefect.cached_results, pgflow_prefect.flow_runs, pgflow_prefect.task_runs,
             pgflow_prefect.external_claims, pgflow_prefect.heartbeats, pgflow_prefect.mirrored_runs;
    -- What Airflow executes stays so.
    INSERT INTO pgflow_prefect.owners (run_id, epoch, held_by, lease_until)
    SELECT m.run_id, r.epoch, 'Airflow', CASE r.status WHEN 'pending' THEN '9999-12-31' ELSE '-infinity' END::timestamptz
    FROM unnest(mirrored) m JOIN pgflow.runs r ON r.id = m.run_id;
    INSERT INTO pgflow_prefect.mirrored_runs
    SELECT m.* FROM unnest(mirrored) m JOIN pgflow_prefect.owners o ON o.run_id = m.run_id;
    UPDATE pgflow_prefect.mirrored_runs m
    SET shown = false,
        imported = m.imported OR EXISTS (SELECT FROM pgflow.runs r WHERE r.id = m.run_id AND r.status <> 'pending');
    UPDATE pgflow_prefect.mirrors SET holder = NULL, held_by = NULL, lease_until = '-infinity';
    -- Nor does it start runs for the dates that the original is at.
    PERFORM pgflow.pause_backfill(b.id) FROM pgflow.backfills b WHERE b.status = 'running';
    UPDATE pgflow_prefect.enabled_workflows SET since = clock_timestamp();
    RETURN new_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.new_installation() IS
    'Makes this copy of a database an installation of its own, with a new id and nothing of the original''s in '
    'Prefect. Workers take no run that is pending now, unless they adopt. Stop its services first.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_installation() RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    UPDATE pgflow_prefect.installation i
    SET former_stamps = i.former_stamps || i.stamp, stamp = pgflow_prefect.current_stamp()
    WHERE NOT pgflow_prefect.is_same_stamp(i.stamp, pgflow_prefect.current_stamp());
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_installation() IS
    'Lets this database, restored or upgraded, replace the one that it is a copy of, which is gone. False if it '
    'is no copy.';


CREATE OR REPLACE FUNCTION pgflow_prefect.use_installation()
RETURNS TABLE (id uuid, stamp text, current_stamp text, former_stamps text[], fits boolean, is_used boolean)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    SELECT * INTO id, stamp, current_stamp, former_stamps, fits, is_used FROM pgflow_prefect.read_installation();
    IF NOT fits AND NOT is_used THEN
        PERFORM pgflow_prefect.claim_installation(); -- another session may do it at this moment
        SELECT * INTO id, stamp, current_stamp, former_stamps, fits, is_used FROM pgflow_prefect.read_installation();
    END IF;
    IF fits AND NOT is_used THEN
        INSERT INTO pgflow_prefect.heartbeats DEFAULT VALUES ON CONFLICT DO NOTHING;
    END IF;
    IF id IS NOT NULL THEN
        RETURN NEXT;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.use_installation() IS
    'read_installation for a process that will write to Prefect: after this, the installation counts as used.';


CREATE OR REPLACE FUNCTION pgflow_prefect.beat(beat uuid, every double precision) RETURNS uuid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO pgflow_prefect.heartbeats AS h (beats) VALUES (ARRAY[beat.beat])
    ON CONFLICT (is_only_row) DO UPDATE
    SET beats = (beat.beat || h.beats)[1:100], beat_at = clock_timestamp()
    WHERE cardinality(h.beats) = 0 OR h.beat_at < clock_timestamp() - make_interval(secs => every);
    RETURN (SELECT h.beats FROM pgflow_prefect.heartbeats h);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.beat(uuid, double precision) IS
    'Notes a sign of life, unless another service gave one within so many seconds; returns the latest, newest first.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_under_policies() RETURNS boolean
LANGUAGE sql STABLE -- no SET clause, so that PostgreSQL can inline it
AS $$
    SELECT pg_catalog.row_security_active('pgflow_prefect.owners'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow_prefect.flow_runs'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow_prefect.task_runs'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow_prefect.bindings'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow_prefect.external_claims'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow_prefect.enabled_workflows'::pg_catalog.regclass)
        OR pg_catalog.row_security_active('pgflow_prefect.set_aside_runs'::pg_catalog.regclass)
$$;

COMMENT ON FUNCTION pgflow_prefect.is_under_policies() IS
    'pgflow.is_under_policies for the tables of this schema that taking runs and claiming steps need.';


------------------------------------------------------------------------------------------------------------
-- Ownership. A process that takes a run gets the next epoch, and everything that carries an older one is refused: that is
-- what keeps two writers apart. A lease only says when another process may take it.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.is_leased(lease_until timestamptz, lease double precision) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    -- No process could extend a lease while this server was down. After its start, the runs must not all be taken over.
    SELECT lease_until > clock_timestamp()
        OR (lease_until > 'epoch' AND clock_timestamp() < pg_postmaster_start_time() + make_interval(secs => lease))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_leased(timestamptz, double precision) IS
    'True while a lease holds. Every lease holds for one lease length (in seconds) after the server''s start.';


CREATE OR REPLACE FUNCTION pgflow_prefect.how_held(owner pgflow_prefect.owners, epoch int, lease double precision)
RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN owner.run_id IS NULL THEN NULL
                WHEN owner.epoch <> how_held.epoch OR owner.lease_until = '-infinity' THEN 'released'
                WHEN owner.lease_until = 'infinity' THEN 'queued'
                WHEN pgflow_prefect.is_leased(owner.lease_until, lease) THEN 'leased'
                ELSE 'expired' END
$$;

COMMENT ON FUNCTION pgflow_prefect.how_held(pgflow_prefect.owners, int, double precision) IS
    'How the owner holds a run that is in this epoch: leased, queued in Prefect, expired, or released. NULL: no '
    'owner.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_older(
    created_at timestamptz, epoch int, owner pgflow_prefect.owners, enabled pgflow_prefect.enabled_workflows
) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN owner.run_id IS NULL THEN (created_at >= enabled.since) IS NOT TRUE
                WHEN owner.adopted OR owner.epoch <> is_older.epoch THEN false -- reopened: a user wants the run to go on
                ELSE (created_at >= enabled.first_enabled) IS NOT TRUE END
$$;

COMMENT ON FUNCTION pgflow_prefect.is_older(timestamptz, int, pgflow_prefect.owners, pgflow_prefect.enabled_workflows) IS
    'True for a run that services take only if they adopt: it began before its workflow was enabled. A run that '
    'had an owner goes on after the workflow was disabled and enabled again. So does a run that a service has '
    'adopted.';


CREATE OR REPLACE FUNCTION pgflow_prefect.refuse_mirrored(run_id uuid, doing text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    IF EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m
               WHERE m.run_id = refuse_mirrored.run_id AND NOT m.executed_here) THEN
        RAISE EXCEPTION 'run % can''t be %: Airflow executes it, or has executed it', run_id, doing
            USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'mirrored_runs',
                  HINT = 'Do it in Airflow. `pgflow-prefect retry --force` makes the run one of this database.';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.refuse_mirrored(uuid, text) IS
    'Raises an error for a run that Airflow executes: the mirror would undo it. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_run(
    run_id uuid, flow_run_id uuid, held_by text, lease double precision, max_recoveries int,
    force boolean DEFAULT false
) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    owner pgflow_prefect.owners;
    taken int;
    recoveries int := 0;
    items_ended int := 0;
BEGIN
    IF run.status OPERATOR(pg_catalog.<>) 'pending' THEN
        RETURN NULL;
    END IF;
    IF run.uses_rules THEN -- else it has no maps
        SELECT coalesce(pg_catalog.sum(m.total OPERATOR(pg_catalog.-) m.remaining), 0) INTO items_ended
        FROM pgflow.step_maps m WHERE m.run_id OPERATOR(pg_catalog.=) run.id;
    END IF;
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    PERFORM pgflow_prefect.refuse_mirrored(run.id, 'taken');
    SELECT * INTO owner FROM pgflow_prefect.owners o WHERE o.run_id OPERATOR(pg_catalog.=) run.id FOR UPDATE;
    IF owner.epoch OPERATOR(pg_catalog.=) run.epoch THEN
        -- In another epoch, the run was reopened or taken by hand, and its former owner has lost it.
        IF pgflow_prefect.is_leased(owner.lease_until, lease) AND NOT force
           -- A reserved run waits for its flow run, which may be this one.
           AND (take_run.flow_run_id IS NULL OR owner.flow_run_id OPERATOR(pg_catalog.<>) take_run.flow_run_id) THEN
            RAISE EXCEPTION 'run % is held by %', run.id, owner.held_by
                USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'owners_lease',
                      HINT = pg_catalog.format('Its lease ends at %s, unless it is extended.', owner.lease_until);
        END IF;
        recoveries := owner.recoveries;
        IF owner.flow_run_id IS NULL AND NOT pgflow_prefect.is_leased(owner.lease_until, lease) THEN
            -- The run was reserved, and no process has begun to execute it. Keep the epoch, which is part of the flow
            -- run's idempotency key: if Prefect has created the flow run and its answer was lost, this finds it.
            taken := run.epoch;
        ELSIF pgflow_prefect.how_held(owner, run.epoch, lease) OPERATOR(pg_catalog.=) 'expired' THEN
            recoveries := CASE WHEN run.remaining OPERATOR(pg_catalog.<) owner.remaining
                                    OR items_ended OPERATOR(pg_catalog.>) owner.items_ended THEN 0
                               ELSE owner.recoveries OPERATOR(pg_catalog.+) 1 END;
        END IF;
        IF recoveries OPERATOR(pg_catalog.>) max_recoveries THEN
            PERFORM pgflow_prefect.give_up_run(run.id, pg_catalog.format(
                'given up: %s owners in a row have vanished while no further step completed, the last one was %s',
                recoveries, owner.held_by));
            RETURN NULL;
        END IF;
    ELSIF owner.run_id IS NOT NULL THEN -- the time-outs of steps that others do begin anew
        UPDATE pgflow_prefect.task_runs t SET updated_at = pg_catalog.clock_timestamp()
        WHERE t.run_id OPERATOR(pg_catalog.=) run.id AND t.state_name OPERATOR(pg_catalog.=) 'Waiting';
    END IF;
    taken := coalesce(taken, run.epoch OPERATOR(pg_catalog.+) 1);
    IF (run.taken_in OPERATOR(pg_catalog.=) taken) IS NOT TRUE THEN
        taken := pgflow.set_epoch(run, taken, taken);
    END IF;
    INSERT INTO pgflow_prefect.owners AS o (run_id, epoch, flow_run_id, held_by, lease_until, remaining, recoveries,
                                            items_ended)
    VALUES (run.id, taken, take_run.flow_run_id, take_run.held_by,
            pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) pg_catalog.make_interval(secs => lease),
            run.remaining, recoveries, items_ended)
    ON CONFLICT (run_id) DO UPDATE
    SET epoch = excluded.epoch, flow_run_id = excluded.flow_run_id, held_by = excluded.held_by,
        lease_until = excluded.lease_until, remaining = excluded.remaining, recoveries = excluded.recoveries,
        items_ended = excluded.items_ended,
        settled = false, taken_at = pg_catalog.clock_timestamp();
    PERFORM pgflow_prefect.note_flow_run(run.id, taken, take_run.flow_run_id);
    RETURN taken;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_run(uuid, uuid, text, double precision, int, boolean) IS
    'Makes a flow run the owner of a pending run for `lease` seconds and returns the new epoch. NULL if the run '
    'has ended, or ends now because too many owners vanished. Without a flow run, reserves the run for a new one. '
    'Refuses a run that another process holds, unless forced.';


CREATE OR REPLACE FUNCTION pgflow_prefect.give_up_run(run_id uuid, reason text) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    PERFORM pgflow.fail_run(give_up_run.run_id, give_up_run.reason);
    UPDATE pgflow_prefect.owners AS o SET given_up_in = r.epoch
    FROM pgflow.runs r
    WHERE r.id OPERATOR(pg_catalog.=) give_up_run.run_id AND o.run_id OPERATOR(pg_catalog.=) r.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.give_up_run(uuid, text) IS
    'pgflow.fail_run for a run whose owners vanish one after the other. reconcile names such a run. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_cancelled_for_good(run_id uuid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT EXISTS (SELECT FROM pgflow.runs r WHERE r.id = is_cancelled_for_good.run_id AND r.status = 'failed'
                   AND r.ended_as = 'cancelled')
$$;

COMMENT ON FUNCTION pgflow_prefect.is_cancelled_for_good(uuid) IS
    'True for a run that cancel_run has ended. SQL and pgflow-prefect retry reopen it, Prefect''s Retry does not. '
    'For workers of version 6.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_made_for(run_id uuid, flow_run_id uuid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT EXISTS (SELECT FROM pgflow_prefect.flow_runs f
                   WHERE f.run_id = is_made_for.run_id AND f.flow_run_id = is_made_for.flow_run_id)
        OR EXISTS (SELECT FROM pgflow.runs r
                   JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug AND e.enabled
                   LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
                   -- A reserved run waits for its flow run, which may be this one.
                   WHERE r.id = is_made_for.run_id AND (o.run_id IS NULL OR o.flow_run_id IS NULL))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_made_for(uuid, uuid) IS
    'True if a flow run that Prefect started may take a run: it was made for the run, or the run was never taken '
    'and its workflow is enabled.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_flow_run(run_id uuid, epoch int, flow_run_id uuid) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    INSERT INTO pgflow_prefect.flow_runs (run_id, epoch, flow_run_id)
    SELECT note_flow_run.run_id, note_flow_run.epoch, note_flow_run.flow_run_id
    WHERE note_flow_run.flow_run_id IS NOT NULL
    ON CONFLICT (run_id, epoch) DO UPDATE SET flow_run_id = excluded.flow_run_id
$$;

COMMENT ON FUNCTION pgflow_prefect.note_flow_run(uuid, int, uuid) IS 'Adds to the history of a run. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.create_run(
    workflow_slug text, payload jsonb, run_id uuid, flow_run_id uuid, held_by text, lease double precision,
    max_recoveries int, logical_date timestamptz DEFAULT NULL, interval_start timestamptz DEFAULT NULL
) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    wanted pgflow.runs;
    run pgflow.runs;
BEGIN
    wanted.workflow_slug := workflow_slug;
    wanted.id := run_id;
    wanted.payload := payload;
    wanted.logical_date := logical_date;
    wanted.data_interval := CASE WHEN interval_start IS NOT NULL
                                 THEN pg_catalog.tstzrange(interval_start, logical_date) END;
    -- One transaction: otherwise a worker could take the run after its start.
    run := pgflow.begin_run(wanted);
    -- The run's id follows from the flow run's id, so another session may have used it before. In a run that this
    -- transaction has inserted, a trigger may have changed the payload.
    IF (run.payload OPERATOR(pg_catalog.=) create_run.payload) IS NOT TRUE
       AND NOT EXISTS (SELECT FROM pgflow.runs r
                       WHERE r.id OPERATOR(pg_catalog.=) run.id
                         AND r.xmin OPERATOR(pg_catalog.=) pg_catalog.pg_current_xact_id()::pg_catalog.xid)
       AND NOT EXISTS (SELECT FROM pgflow_prefect.flow_runs f
                       WHERE f.run_id OPERATOR(pg_catalog.=) run.id
                         AND f.flow_run_id OPERATOR(pg_catalog.=) create_run.flow_run_id) THEN
        RAISE EXCEPTION 'run % exists already, with another payload', run.id
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'This flow run did not create it: start a new flow run.';
    END IF;
    RETURN pgflow_prefect.take_run(run_id, flow_run_id, held_by, lease, max_recoveries);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.create_run(
    text, jsonb, uuid, uuid, text, double precision, int, timestamptz, timestamptz) IS
    'pgflow.run_workflow and take_run in one. A run that a schedule starts has the logical date at which it is due.';


CREATE OR REPLACE FUNCTION pgflow_prefect.set_aside(run_id uuid, reason text) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    INSERT INTO pgflow_prefect.set_aside_runs AS s (run_id, epoch, reason)
    SELECT r.id, r.epoch, left(set_aside.reason, 1000) FROM pgflow.runs r WHERE r.id = set_aside.run_id
    ON CONFLICT (run_id) DO UPDATE
    SET epoch = excluded.epoch, reason = excluded.reason,
        -- One epoch later: it was taken once since, and then refused again.
        tries = CASE WHEN excluded.epoch <= s.epoch + 1 THEN s.tries + 1 ELSE 1 END,
        next_try = CASE WHEN excluded.epoch <= s.epoch + 1
                        THEN clock_timestamp() + least(300, 2 ^ least(s.tries, 10)) * interval '1 second'
                        ELSE excluded.next_try END
$$;

COMMENT ON FUNCTION pgflow_prefect.set_aside(uuid, text) IS
    'Notes why a run could not be taken, and when to try again: after 1 s, 2 s, 4 s, ..., at most 5 minutes. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.rehearse_refused(run_id uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    refused pgflow.step_states;
    item_indexes pg_catalog.int4[];
BEGIN
    IF pgflow.is_under_policies() OR pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    SELECT s.* INTO refused
    FROM pgflow_prefect.set_aside_runs a
    JOIN pgflow.step_states s ON s.run_id OPERATOR(pg_catalog.=) a.run_id AND s.step_slug OPERATOR(pg_catalog.=) a.step_slug
    JOIN pgflow.runs r ON r.id OPERATOR(pg_catalog.=) a.run_id AND r.status OPERATOR(pg_catalog.=) 'pending'
    JOIN pgflow.definition_steps d ON d.definition_id OPERATOR(pg_catalog.=) r.definition_id
                                  AND d.slug OPERATOR(pg_catalog.=) a.step_slug AND d.child_workflow IS NULL
    WHERE a.run_id OPERATOR(pg_catalog.=) rehearse_refused.run_id AND s.status OPERATOR(pg_catalog.=) 'pending'
      -- A trigger may refuse the rehearsal's result only: now and then, the handler's own is tried.
      AND a.tries OPERATOR(pg_catalog.%) 4 OPERATOR(pg_catalog.<>) 0;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    BEGIN
        IF EXISTS (SELECT FROM pgflow.step_maps m WHERE m.run_id OPERATOR(pg_catalog.=) refused.run_id
                                                    AND m.step_slug OPERATOR(pg_catalog.=) refused.step_slug) THEN
            SELECT pg_catalog.array_agg(c.item_index) INTO item_indexes
            FROM pgflow.claim_items(refused.run_id, refused.step_slug, 1) c;
            IF item_indexes IS NULL THEN -- the former owner has claimed what is left
                SELECT ARRAY[pg_catalog.min(i.item_index)] INTO item_indexes FROM pgflow.step_items i
                WHERE i.run_id OPERATOR(pg_catalog.=) refused.run_id
                  AND i.step_slug OPERATOR(pg_catalog.=) refused.step_slug AND i.status OPERATOR(pg_catalog.=) 'pending';
            END IF;
            IF item_indexes[1] IS NOT NULL THEN
                PERFORM pgflow.complete_items(refused.run_id, refused.step_slug, item_indexes, '[null]');
            END IF;
        ELSE
            PERFORM pgflow.claim_step(refused.run_id, refused.step_slug, NULL, '{}', false);
            PERFORM pgflow.complete_step(refused.run_id, refused.step_slug, 'null');
        END IF;
        SET CONSTRAINTS ALL IMMEDIATE;
        RAISE EXCEPTION 'the rehearsal is over' USING ERRCODE = 'PGF00';
    EXCEPTION WHEN SQLSTATE 'PGF00' THEN
        NULL; -- nothing refuses it any more, and all of it was rolled back
    END;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.rehearse_refused(uuid) IS
    'Of a run that was set aside because the claim or the end of a step was refused: claims and completes the step and '
    'rolls that back. Raises what refuses it, so that no handler is executed whose end can''t be noted. The result is null, '
    'so every fourth try goes without. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_parent(parent_run_id uuid, parent_step_slug text) RETURNS uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN (SELECT o.flow_run_id FROM pgflow_prefect.owners o JOIN pgflow.runs r ON r.id = o.run_id AND r.epoch = o.epoch
            WHERE o.run_id = find_parent.parent_run_id
              AND EXISTS (SELECT FROM pgflow_prefect.task_runs t
                          WHERE t.run_id = o.run_id AND t.step_slug = find_parent.parent_step_slug AND t.task_index = 0));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_parent(uuid, text) IS
    'The flow run that shows the parent of a child, and in it the step that waits for the child; NULL where none does. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.may_be_shown(
    parent_run_id uuid, parent_step_slug text, created_at timestamptz
) RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN may_be_shown.created_at < clock_timestamp() - interval '2 seconds'
        OR pgflow_prefect.find_parent(may_be_shown.parent_run_id, may_be_shown.parent_step_slug) IS NOT NULL
        OR NOT EXISTS (SELECT FROM pgflow.runs r
                       JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug AND e.enabled
                       WHERE r.id = may_be_shown.parent_run_id AND r.status = 'pending');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.may_be_shown(uuid, text, timestamptz) IS
    'Whether a child can be taken: its parent''s owner has claimed the step, and Prefect can show the child below it. Where the '
    'owner lets it wait, from its third second on. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.choose_runs(
    workflow_slug text, held boolean, wanted int, adopt boolean, lease double precision, besides uuid[], live boolean
) RETURNS TABLE (run_id uuid, former_flow_run_id uuid, needs_adoption boolean, backfill_id bigint, parent_flow_run_id uuid,
               parent_step_slug text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_sort = off
AS $$
#variable_conflict use_column
DECLARE
    enabling pgflow_prefect.enabled_workflows; -- read once for all runs
BEGIN
    SELECT * INTO enabling FROM pgflow_prefect.enabled_workflows e
    WHERE e.workflow_slug = choose_runs.workflow_slug AND e.enabled;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT r.id, CASE WHEN o.epoch = r.epoch THEN o.flow_run_id END,
               (r.created_at >= enabling.first_enabled) IS NOT TRUE, r.backfill_id,
               CASE WHEN r.parent_run_id IS NOT NULL THEN pgflow_prefect.find_parent(r.parent_run_id, r.parent_step_slug) END,
               r.parent_step_slug
        FROM pgflow.runs r
        LEFT JOIN LATERAL (
            SELECT o AS whole, o.*
            FROM pgflow_prefect.owners o WHERE o.run_id = r.id OFFSET 0) o ON true -- as in watch_steps
        WHERE r.workflow_slug = choose_runs.workflow_slug AND r.status = 'pending'
          AND (r.taken_in IS DISTINCT FROM r.epoch) = (NOT held) -- as the index has it
          AND r.id <> ALL (coalesce(besides, '{}'))
          AND coalesce((r.backfill_id IS NULL) = live, true)
          -- A run that was taken before it could be noted looks free.
          AND CASE WHEN o.epoch = r.epoch AND pgflow_prefect.is_leased(o.lease_until, lease) THEN false
                   ELSE adopt OR r.parent_run_id IS NOT NULL OR NOT pgflow_prefect.is_older(r.created_at, r.epoch, o.whole, enabling) END
          AND NOT EXISTS (SELECT FROM pgflow_prefect.set_aside_runs s
                          WHERE s.run_id = r.id AND s.epoch = r.epoch AND s.next_try > clock_timestamp()
                          OFFSET 0) -- as in closes_cycle
          AND (r.parent_run_id IS NULL OR pgflow_prefect.may_be_shown(r.parent_run_id, r.parent_step_slug, r.created_at))
          AND NOT EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m
                          WHERE m.run_id = r.id AND NOT m.executed_here OFFSET 0) -- Airflow executes it
        ORDER BY r.created_at
        LIMIT wanted
        FOR NO KEY UPDATE OF r SKIP LOCKED; -- others who look at this moment take others
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_runs(text, boolean, int, boolean, double precision, uuid[], boolean) IS
    'Locks the runs of a workflow that take_runs is to take, and returns them: free ones, or (held) those that were '
    'taken and whose lease has run out. live: without those of backfills; false: only those; NULL: all. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_looks(workflow_slugs text[])
RETURNS TABLE (workflow_slug text, live boolean)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT w.slug, l.live
    FROM (VALUES (1, true, true), (2, true, false), (3, false, NULL)) AS l (turn, with_backfills, live)
    CROSS JOIN unnest(workflow_slugs) WITH ORDINALITY AS w (slug, place)
    WHERE l.with_backfills = EXISTS (SELECT FROM pgflow.backfills)
    ORDER BY l.turn, w.place
$$;

COMMENT ON FUNCTION pgflow_prefect.list_looks(text[]) IS
    'In which order take_runs looks for runs: all workflows, and where there are backfills, their runs after the live runs '
    'of all workflows. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_runs(
    workflow_slugs text[], wanted int, adopt boolean, held_by text, lease double precision, max_recoveries int,
    besides uuid[], expired boolean
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, former_flow_run_id uuid, was_held boolean, backfill_id bigint,
               parent_flow_run_id uuid, parent_step_slug text)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    most_passed_over CONSTANT int := 100; -- a call: what is left is looked at in the next one
    candidate pg_catalog.record;
    open_slots int := wanted;
    live boolean;
    passed_over int := 0;
    before int;
    reason pg_catalog.text;
    broken_constraint pg_catalog.text;
    context pg_catalog.text;
    cancelled boolean := false;
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    FOR workflow_slug, live IN -- one by one, each in the order of the index
        SELECT l.workflow_slug, l.live FROM pgflow_prefect.list_looks(workflow_slugs) l
    LOOP
        was_held := expired IS TRUE; -- these first: they had begun before
        LOOP
            before := passed_over;
            FOR candidate IN
                SELECT * FROM pgflow_prefect.choose_runs(workflow_slug, was_held, open_slots, adopt, lease, besides, live)
            LOOP
                epoch := NULL;
                BEGIN
                    IF EXISTS (SELECT FROM pgflow_prefect.set_aside_runs s
                               WHERE s.run_id OPERATOR(pg_catalog.=) candidate.run_id AND s.step_slug IS NOT NULL) THEN
                        PERFORM pgflow_prefect.rehearse_refused(candidate.run_id);
                    END IF;
                    epoch := pgflow_prefect.take_run(candidate.run_id, NULL, held_by, lease, max_recoveries);
                    SET CONSTRAINTS ALL IMMEDIATE; -- a deferred trigger would raise at the commit, for all runs
                -- Whatever it is, it is this run's: the others can be taken. Where the database itself is in trouble,
                -- the note below raises as well.
                EXCEPTION WHEN OTHERS OR assert_failure OR query_canceled THEN
                    epoch := NULL;
                    cancelled := SQLSTATE OPERATOR(pg_catalog.=) '57014'; -- it has used up the time of the statement
                    GET STACKED DIAGNOSTICS reason = MESSAGE_TEXT, broken_constraint = CONSTRAINT_NAME,
                                            context = PG_EXCEPTION_CONTEXT;
                    -- Else its owner was late, and has just extended it.
                    IF broken_constraint OPERATOR(pg_catalog.<>) 'owners_lease' THEN
                        PERFORM pgflow_prefect.set_aside(candidate.run_id, pg_catalog.format(
                            '%s (%s, %s)', reason, SQLSTATE, pg_catalog.split_part(context, E'\n', 1)));
                    END IF;
                END;
                IF cancelled THEN
                    RETURN;
                ELSIF epoch IS NULL THEN
                    passed_over := passed_over OPERATOR(pg_catalog.+) 1;
                    CONTINUE;
                END IF;
                IF candidate.needs_adoption THEN
                    UPDATE pgflow_prefect.owners o SET adopted = true
                    WHERE o.run_id OPERATOR(pg_catalog.=) candidate.run_id;
                END IF;
                run_id := candidate.run_id;
                former_flow_run_id := candidate.former_flow_run_id;
                backfill_id := candidate.backfill_id;
                parent_flow_run_id := candidate.parent_flow_run_id;
                parent_step_slug := candidate.parent_step_slug;
                open_slots := open_slots OPERATOR(pg_catalog.-) 1;
                RETURN NEXT;
            END LOOP;
            EXIT WHEN open_slots OPERATOR(pg_catalog.<=) 0;
            -- Behind those that were passed over there may be others.
            CONTINUE WHEN passed_over OPERATOR(pg_catalog.>) before
                          AND passed_over OPERATOR(pg_catalog.<) most_passed_over;
            EXIT WHEN NOT was_held;
            was_held := false;
        END LOOP;
        EXIT WHEN open_slots OPERATOR(pg_catalog.<=) 0;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_runs(text[], int, boolean, text, double precision, int, uuid[], boolean) IS
    'Reserves pending runs that no process holds, the oldest first, at most so many: of enabled workflows, begun since '
    'they were enabled (adopt: older ones, too). Reads none that was taken, unless `expired` asks for those whose lease '
    'has run out: they come first. Runs of backfills come after all others. A run that raises an error is set aside for a '
    'while. Never those of besides, which the caller executes.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_runs(
    workflow_slugs text[], wanted int, adopt boolean, held_by text, lease double precision, max_recoveries int,
    besides uuid[] DEFAULT '{}'
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, former_flow_run_id uuid)
LANGUAGE sql VOLATILE
AS $$
    SELECT t.run_id, t.workflow_slug, t.epoch, t.former_flow_run_id
    FROM pgflow_prefect.take_runs(workflow_slugs, wanted, adopt, held_by, lease, max_recoveries, besides, true) t
$$;

COMMENT ON FUNCTION pgflow_prefect.take_runs(text[], int, boolean, text, double precision, int, uuid[]) IS
    'Signature of version 6: looks at every pending run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.choose_children(
    parents uuid[], workflow_slugs text[], wanted int, lease double precision, besides uuid[]
) RETURNS TABLE (run_id uuid, workflow_slug text, former_flow_run_id uuid, parent_flow_run_id uuid, parent_step_slug text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT r.id, r.workflow_slug, CASE WHEN o.epoch = r.epoch THEN o.flow_run_id END,
               pgflow_prefect.find_parent(r.parent_run_id, r.parent_step_slug), r.parent_step_slug
        FROM pgflow.runs r
        LEFT JOIN LATERAL (
            SELECT o.* FROM pgflow_prefect.owners o WHERE o.run_id = r.id OFFSET 0) o ON true
        WHERE r.parent_run_id = ANY (choose_children.parents) AND r.status = 'pending'
          AND r.workflow_slug = ANY (choose_children.workflow_slugs)
          AND r.id <> ALL (coalesce(besides, '{}'))
          AND NOT (o.epoch IS NOT DISTINCT FROM r.epoch AND pgflow_prefect.is_leased(o.lease_until, choose_children.lease))
          AND NOT EXISTS (SELECT FROM pgflow_prefect.set_aside_runs s
                          WHERE s.run_id = r.id AND s.epoch = r.epoch AND s.next_try > clock_timestamp() OFFSET 0)
          AND pgflow_prefect.may_be_shown(r.parent_run_id, r.parent_step_slug, r.created_at)
        LIMIT wanted
        FOR NO KEY UPDATE OF r SKIP LOCKED;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_children(uuid[], text[], int, double precision, uuid[]) IS
    'Locks the children that take_children is to take, and returns them. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_children(
    parents uuid[], workflow_slugs text[], wanted int, held_by text, lease double precision, max_recoveries int,
    besides uuid[]
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, former_flow_run_id uuid, parent_flow_run_id uuid,
                 parent_step_slug text)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    candidate pg_catalog.record;
    reason pg_catalog.text;
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    FOR candidate IN SELECT * FROM pgflow_prefect.choose_children(parents, workflow_slugs, wanted, lease, besides) LOOP
        epoch := NULL;
        BEGIN
            IF EXISTS (SELECT FROM pgflow_prefect.set_aside_runs s
                       WHERE s.run_id OPERATOR(pg_catalog.=) candidate.run_id AND s.step_slug IS NOT NULL) THEN
                PERFORM pgflow_prefect.rehearse_refused(candidate.run_id);
            END IF;
            epoch := pgflow_prefect.take_run(candidate.run_id, NULL, held_by, lease, max_recoveries);
        EXCEPTION WHEN OTHERS THEN -- as in take_runs
            GET STACKED DIAGNOSTICS reason = MESSAGE_TEXT;
            PERFORM pgflow_prefect.set_aside(candidate.run_id, pg_catalog.format('%s (%s)', reason, SQLSTATE));
        END;
        CONTINUE WHEN epoch IS NULL;
        run_id := candidate.run_id;
        workflow_slug := candidate.workflow_slug;
        former_flow_run_id := candidate.former_flow_run_id;
        parent_flow_run_id := candidate.parent_flow_run_id;
        parent_step_slug := candidate.parent_step_slug;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_children(uuid[], text[], int, text, double precision, int, uuid[]) IS
    'Reserves pending children of these runs that no process holds, at most so many, of these workflows. For a process that '
    'executes the parents, and is no worker.';


CREATE OR REPLACE FUNCTION pgflow_prefect.link_flow_run(
    run_id uuid, epoch int, flow_run_id uuid, held_by text, queued boolean
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.owners o
    SET flow_run_id = link_flow_run.flow_run_id,
        lease_until = CASE WHEN queued THEN 'infinity' ELSE o.lease_until END
    WHERE o.run_id = link_flow_run.run_id AND o.epoch = link_flow_run.epoch AND o.flow_run_id IS NULL
      AND o.held_by = link_flow_run.held_by; -- an expired reservation keeps its epoch, but not its holder
    IF FOUND THEN
        PERFORM pgflow_prefect.note_flow_run(run_id, epoch, flow_run_id);
        RETURN true;
    END IF;
    RETURN EXISTS (SELECT FROM pgflow_prefect.owners o
                   WHERE o.run_id = link_flow_run.run_id AND o.flow_run_id = link_flow_run.flow_run_id
                     AND o.held_by = link_flow_run.held_by);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.link_flow_run(uuid, int, uuid, text, boolean) IS
    'Names the flow run of a reserved run. queued: the lease has no end, because Prefect decides when the flow '
    'run starts. False if another process has taken the run meanwhile.';


CREATE OR REPLACE FUNCTION pgflow_prefect.link_flow_runs(
    run_ids uuid[], epochs int[], flow_run_ids uuid[], held_by text
) RETURNS TABLE (run_id uuid, linked boolean, status text, remaining int, definition_id bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_custom_plan -- an old plan, made for few runs, would read all runs
AS $$
#variable_conflict use_column
DECLARE
    link record;
BEGIN
    FOR link IN
        SELECT u.run_id, u.epoch, u.flow_run_id FROM unnest(run_ids, epochs, flow_run_ids) AS u (run_id, epoch, flow_run_id)
        ORDER BY u.run_id -- in one order, so that two processes never wait for each other
    LOOP
        run_id := link.run_id;
        linked := pgflow_prefect.link_flow_run(link.run_id, link.epoch, link.flow_run_id, held_by, false);
        status := NULL;
        remaining := NULL;
        definition_id := NULL;
        SELECT r.status, r.remaining, r.definition_id INTO status, remaining, definition_id
        FROM pgflow.runs r WHERE r.id = link.run_id;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.link_flow_runs(uuid[], int[], uuid[], text) IS
    'link_flow_run for several runs, by id, with the facts that their first claims need: status, number of steps '
    'left, definition.';


CREATE OR REPLACE FUNCTION pgflow_prefect.extend_leases(
    run_ids uuid[], epochs int[], lease double precision
) RETURNS TABLE (run_id uuid, epoch int, holds text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    -- By key, as in watch_steps. A row that another transaction has locked is left to the next extension. So no lease
    -- waits for another one, and no two sessions wait for each other.
    UPDATE pgflow_prefect.owners o
    SET lease_until = clock_timestamp() + make_interval(secs => lease)
    WHERE o.run_id = ANY (ARRAY(
        SELECT free.run_id
        FROM unnest(run_ids, epochs) AS held (run_id, epoch)
        CROSS JOIN LATERAL (
            SELECT f.run_id FROM pgflow_prefect.owners f WHERE f.run_id = held.run_id AND f.epoch = held.epoch
            OFFSET 0 FOR NO KEY UPDATE SKIP LOCKED) free));
    RETURN QUERY
        SELECT held.run_id, held.epoch,
               CASE WHEN r.epoch IS DISTINCT FROM held.epoch THEN 'lost'
                    WHEN r.status = 'pending' THEN 'held'
                    WHEN r.status = 'completed' THEN 'completed'
                    -- A failed run's claimed steps may still finish.
                    WHEN EXISTS (SELECT FROM pgflow.step_states s
                                 WHERE s.run_id = held.run_id AND s.status = 'pending' AND s.started_at IS NOT NULL
                                 OFFSET 0)
                    THEN 'held' ELSE 'ended' END
        FROM unnest(run_ids, epochs) AS held (run_id, epoch)
        LEFT JOIN LATERAL (
            SELECT r.epoch, r.status FROM pgflow.runs r WHERE r.id = held.run_id OFFSET 0) r ON true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.extend_leases(uuid[], int[], double precision) IS
    'Extends the leases of runs in the epochs in which they were taken, and tells of each: held; lost to another '
    'owner; completed, though perhaps not shown yet; ended otherwise, with no report outstanding.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_holder(run_id uuid, epoch int, holder jsonb) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    UPDATE pgflow_prefect.owners o
    SET holder = note_holder.holder || jsonb_build_object('epoch', o.epoch)
    WHERE o.run_id = note_holder.run_id AND o.epoch = note_holder.epoch
$$;

COMMENT ON FUNCTION pgflow_prefect.note_holder(uuid, int, jsonb) IS
    'Notes the process that has taken a run in this epoch, as an object by which its machine can find it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_holders(machine jsonb, only_run uuid DEFAULT NULL)
RETURNS TABLE (run_id uuid, epoch int, held_by text, holder jsonb)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT o.run_id, o.epoch, o.held_by, o.holder - 'epoch'
    FROM pgflow_prefect.owners o
    WHERE NOT o.settled AND o.holder @> (machine || jsonb_build_object('epoch', o.epoch))
      AND o.lease_until > 'epoch' AND o.lease_until < 'infinity'
      AND (only_run IS NULL OR o.run_id = only_run)
      AND EXISTS (SELECT FROM pgflow.runs r WHERE r.id = o.run_id AND r.status = 'pending')
$$;

COMMENT ON FUNCTION pgflow_prefect.list_holders(jsonb, uuid) IS
    'The processes of one machine that hold pending runs, or that hold this one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.expire_lease(run_id uuid, epoch int, holder jsonb) RETURNS boolean
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    -- 1970 and not now: shortly after the server's start, a lease that ended lately still holds. See is_leased.
    UPDATE pgflow_prefect.owners o SET lease_until = 'epoch'
    WHERE o.run_id = expire_lease.run_id AND o.epoch = expire_lease.epoch
      AND o.lease_until > 'epoch' AND o.lease_until < 'infinity'
      AND o.holder = expire_lease.holder || jsonb_build_object('epoch', o.epoch)
    RETURNING true
$$;

COMMENT ON FUNCTION pgflow_prefect.expire_lease(uuid, int, jsonb) IS
    'Ends the lease of a process that its machine knows to be dead, as if the lease had expired. NULL if another '
    'process has taken the run meanwhile.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_run(run_id uuid, epoch int) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    UPDATE pgflow_prefect.owners o SET lease_until = '-infinity'
    WHERE o.run_id OPERATOR(pg_catalog.=) run.id AND o.epoch OPERATOR(pg_catalog.=) release_run.epoch;
    IF FOUND AND run.status OPERATOR(pg_catalog.=) 'pending' AND run.epoch OPERATOR(pg_catalog.=) release_run.epoch
    THEN
        BEGIN
            UPDATE pgflow.runs r SET taken_in = NULL WHERE r.id OPERATOR(pg_catalog.=) run.id;
        EXCEPTION WHEN OTHERS THEN
            NULL; -- a trigger of a user's: the next sweep finds the run by its lease
        END;
        PERFORM pgflow.announce_run(run); -- for its next owner
        RETURN true;
    END IF;
    RETURN false;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.release_run(uuid, int) IS
    'Hands a run back: its lease ends now. False if there was nothing to hand back.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_reservation(run_id uuid, epoch int, held_by text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    PERFORM pgflow.lock_run(run_id); -- before the owner's row, as everywhere
    -- An expired reservation keeps its epoch, so another process may hold the run in the same epoch.
    IF NOT EXISTS (SELECT FROM pgflow_prefect.owners o
                   WHERE o.run_id OPERATOR(pg_catalog.=) release_reservation.run_id
                     AND o.epoch OPERATOR(pg_catalog.=) release_reservation.epoch
                     AND o.held_by OPERATOR(pg_catalog.=) release_reservation.held_by AND o.flow_run_id IS NULL) THEN
        RETURN false;
    END IF;
    RETURN pgflow_prefect.release_run(run_id, epoch);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.release_reservation(uuid, int, text) IS
    'release_run for a run that this process has reserved, and linked to no flow run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.put_off_run(run_id uuid, epoch int, held_by text, reason text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF NOT pgflow_prefect.release_reservation(run_id, epoch, held_by) THEN
        RETURN false;
    END IF;
    PERFORM pgflow_prefect.set_aside(run_id, reason);
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.put_off_run(uuid, int, text, text) IS
    'release_reservation for a run that this process could not begin to execute: it is set aside for a while.';


CREATE OR REPLACE FUNCTION pgflow_prefect.put_off_held_run(run_id uuid, epoch int, step_slug text, reason text)
RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF NOT pgflow_prefect.release_run(run_id, epoch) THEN
        RETURN false;
    END IF;
    PERFORM pgflow_prefect.set_aside(run_id, reason);
    UPDATE pgflow_prefect.set_aside_runs s SET step_slug = put_off_held_run.step_slug
    WHERE s.run_id OPERATOR(pg_catalog.=) put_off_held_run.run_id;
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.put_off_held_run(uuid, int, text, text) IS
    'release_run for a run of which PostgreSQL refuses to note something, of this step: it is set aside for a while. '
    'take_runs rehearses the step before it takes the run again.';


CREATE OR REPLACE FUNCTION pgflow_prefect.enable_workflow(workflow_slug text, enabled boolean DEFAULT true)
RETURNS pgflow_prefect.enabled_workflows
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    row pgflow_prefect.enabled_workflows;
BEGIN
    PERFORM FROM pgflow.workflows w WHERE w.slug = enable_workflow.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    INSERT INTO pgflow_prefect.enabled_workflows AS e (workflow_slug, enabled, first_enabled)
    VALUES (enable_workflow.workflow_slug, enable_workflow.enabled,
            CASE WHEN enable_workflow.enabled THEN clock_timestamp() END)
    ON CONFLICT (workflow_slug) DO UPDATE
    SET enabled = excluded.enabled, first_enabled = coalesce(e.first_enabled, excluded.first_enabled),
        since = CASE WHEN e.enabled = excluded.enabled THEN e.since ELSE excluded.since END -- no change if repeated
    RETURNING e.* INTO row;
    RETURN row;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.enable_workflow(text, boolean) IS
    'Lets workers and bridges take this workflow''s new runs from now on; false: they take none.';


------------------------------------------------------------------------------------------------------------
-- Steps. Claims and reports do what their namesakes in pgflow do, and note the task run in the same round trip.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.is_stale(run_id uuid, epoch int) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.owners o SET stale_writes = o.stale_writes + 1
    WHERE o.run_id = is_stale.run_id AND o.epoch > is_stale.epoch;
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.is_stale(uuid, int) IS
    'Tells whether another owner has taken the run since this epoch, and counts the refused write if so.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_child_workflow(definition_id bigint, step_slug text) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT d.child_workflow FROM pgflow.definition_steps d
    WHERE d.definition_id = find_child_workflow.definition_id AND d.slug = find_child_workflow.step_slug
$$;

COMMENT ON FUNCTION pgflow_prefect.find_child_workflow(bigint, text) IS
    'The workflow whose runs are this step; NULL for any other step. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.wake_child(run pgflow.runs, step_slug text) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    child pgflow.runs;
BEGIN
    SELECT c.* INTO child FROM pgflow.list_pending_children(run.id, wake_child.step_slug, true) l
    JOIN pgflow.runs c ON c.id OPERATOR(pg_catalog.=) l LIMIT 1;
    IF FOUND THEN
        PERFORM pgflow.announce_run(child); -- it could not be taken before this claim
    ELSE
        PERFORM pgflow.resume_children(run); -- its row was inserted by hand, say
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.wake_child(pgflow.runs, text) IS
    'Tells workers that the child of a step that has just been claimed can be taken. Begins it where there is none. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.refuse_task(step_slug text, task_index int) RETURNS void
LANGUAGE plpgsql STABLE
AS $$
BEGIN
    RAISE EXCEPTION 'step "%" has no task %: a plain step has one task, with the index 0',
                    step_slug, coalesce(task_index::pg_catalog.text, 'NULL')
        USING ERRCODE = 'invalid_parameter_value', HINT = 'Address the task by the index 0.';
END
$$;

COMMENT ON FUNCTION pgflow_prefect.refuse_task(text, int) IS
    'Raises 22023: this schema has plain steps only, and each has one task, with the index 0. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_step(
    run_id uuid, step_slug text, task_index int, epoch int, task_run_id uuid, upstream text[], with_payload boolean,
    bound text, has_function boolean, handler text
) RETURNS TABLE (status text, attempt int, payload jsonb, upstream_results jsonb,
                 kind text, target text, options jsonb, waits boolean, waited double precision,
                 began_at timestamptz, ended_at timestamptz, note text, skip_reason text, logical_date timestamptz,
                 interval_start timestamptz, interval_end timestamptz)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    state pgflow.step_states;
    task pgflow_prefect.task_runs;
    doing pg_catalog.text;
    takes_input boolean; -- the whole input: no Python says which part is needed
    map pgflow.definition_steps;
    unmapped pg_catalog.text[]; -- a map's other upstream steps: its array is not part of the input of each item
    reads_nothing boolean; -- the process of a work pool reads the input itself
    child_workflow pg_catalog.text;
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    IF (claim_step.task_index OPERATOR(pg_catalog.=) 0) IS NOT TRUE THEN
        PERFORM pgflow_prefect.refuse_task(step_slug, task_index);
    END IF;
    waits := false;
    run := pgflow.lock_run(claim_step.run_id); -- an external claim comes before this one, or waits for it
    IF run.epoch OPERATOR(pg_catalog.>) claim_step.epoch AND pgflow_prefect.is_stale(run.id, claim_step.epoch) THEN
        RETURN NEXT; -- without a status: an error would roll back the count
        RETURN;
    END IF;
    SELECT b.kind, b.target, b.options INTO kind, target, options
    FROM pgflow_prefect.bindings b
    WHERE b.workflow_slug OPERATOR(pg_catalog.=) run.workflow_slug
      AND b.step_slug OPERATOR(pg_catalog.=) claim_step.step_slug;
    IF run.logical_date IS NOT NULL THEN
        logical_date := run.logical_date;
        interval_start := pg_catalog.lower(run.data_interval);
        interval_end := pg_catalog.upper(run.data_interval);
    END IF;
    doing := coalesce(kind, bound);
    IF run.uses_rules THEN
        child_workflow := pgflow_prefect.find_child_workflow(run.definition_id, claim_step.step_slug);
        IF child_workflow IS NOT NULL THEN
            kind := 'child'; -- whatever a row says
            target := child_workflow;
            options := '{}';
            doing := 'external';
        END IF;
    END IF;
    takes_input := doing OPERATOR(pg_catalog.=) ANY ('{sql,http,queue,command}'::pg_catalog.text[]);
    reads_nothing := doing OPERATOR(pg_catalog.=) 'work-pool';
    IF takes_input AND run.uses_rules THEN
        SELECT * INTO map FROM pgflow.definition_steps d
        WHERE d.definition_id OPERATOR(pg_catalog.=) run.definition_id
          AND d.slug OPERATOR(pg_catalog.=) claim_step.step_slug AND d.step_type OPERATOR(pg_catalog.=) 'map';
        IF FOUND THEN
            unmapped := ARRAY(SELECT d.from_step_slug FROM pgflow.definition_deps d
                              WHERE d.definition_id OPERATOR(pg_catalog.=) run.definition_id
                                AND d.to_step_slug OPERATOR(pg_catalog.=) claim_step.step_slug
                                AND d.from_step_slug OPERATOR(pg_catalog.<>) coalesce(map.map_over, ''));
        END IF;
    END IF;
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) claim_step.step_slug;
    SELECT * INTO task FROM pgflow_prefect.task_runs t
    WHERE t.run_id OPERATOR(pg_catalog.=) run.id AND t.step_slug OPERATOR(pg_catalog.=) claim_step.step_slug
      AND t.task_index OPERATOR(pg_catalog.=) claim_step.task_index;

    IF state.status OPERATOR(pg_catalog.=) 'pending' AND run.status OPERATOR(pg_catalog.=) 'pending'
       AND run.epoch OPERATOR(pg_catalog.=) claim_step.epoch THEN
        -- The step is on a queue, or the endpoint answered 202. The new owner of the run must not send it again.
        IF task.state_name OPERATOR(pg_catalog.=) 'Deferred' AND state.started_at IS NOT NULL THEN
            waits := true;
            waited := extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) state.started_at);
        ELSIF state.started_at IS NOT NULL AND doing OPERATOR(pg_catalog.<>) 'external'
              AND pgflow_prefect.is_claimed_outside(state, claim_step.task_index) THEN
            waits := true; -- an external worker has it: the time-out of the new handler does not count
        ELSIF pgflow_prefect.is_others(doing, has_function) THEN
            waits := true;
            waited := CASE WHEN task.state_name OPERATOR(pg_catalog.=) 'Waiting'
                           THEN extract(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) task.updated_at)
                           ELSE 0 END;
        END IF;
        IF child_workflow IS NOT NULL THEN
            PERFORM pgflow_prefect.wake_child(run, claim_step.step_slug);
            SELECT * INTO state FROM pgflow.step_states s
            WHERE s.run_id OPERATOR(pg_catalog.=) run.id AND s.step_slug OPERATOR(pg_catalog.=) claim_step.step_slug;
            waits := state.status OPERATOR(pg_catalog.=) 'pending';
        END IF;
    END IF;
    -- A run that goes on has failed steps: another program has failed this one before its claim.
    IF waits OR (run.continues AND run.status OPERATOR(pg_catalog.=) 'pending'
                 AND run.epoch OPERATOR(pg_catalog.=) claim_step.epoch AND state.status OPERATOR(pg_catalog.=) 'failed')
       OR (run.status OPERATOR(pg_catalog.<>) 'pending' AND run.epoch OPERATOR(pg_catalog.=) claim_step.epoch
                 AND (state.status OPERATOR(pg_catalog.=) 'completed'
                      -- An external worker has failed it before any claim. cancel_run has not.
                      OR (state.status OPERATOR(pg_catalog.=) 'failed'
                          AND (state.ended_as OPERATOR(pg_catalog.=) 'cancelled') IS NOT TRUE
                          AND pgflow_prefect.is_others(doing, has_function)))) THEN
        status := state.status;
        attempt := state.attempts;
    ELSE
        SELECT c.status, c.attempt, c.payload, c.upstream_results INTO status, attempt, payload, upstream_results
        FROM pgflow.claim_step(run.id, claim_step.step_slug, claim_step.epoch,
                               CASE WHEN takes_input THEN unmapped WHEN reads_nothing THEN '{}' ELSE claim_step.upstream END,
                               takes_input OR (claim_step.with_payload AND NOT reads_nothing)) c;
        IF map.slug IS NOT NULL AND map.map_over IS NULL THEN
            payload := CASE WHEN pg_catalog.cardinality(map.map_path) OPERATOR(pg_catalog.>) 0
                            THEN payload OPERATOR(pg_catalog.#-) map.map_path ELSE 'null' END;
        END IF;
    END IF;
    IF status OPERATOR(pg_catalog.=) 'completed' AND state.skip_reason IS NOT NULL THEN
        skip_reason := state.skip_reason;
        note := pgflow_prefect.describe_skip(state);
    ELSIF status OPERATOR(pg_catalog.=) 'failed'
       OR (status OPERATOR(pg_catalog.=) 'completed' AND doing OPERATOR(pg_catalog.=) 'external') THEN
        began_at := coalesce(state.started_at, state.created_at);
        ended_at := state.finished_at;
        note := CASE WHEN status OPERATOR(pg_catalog.=) 'failed' THEN state.error_message
                     ELSE pgflow_prefect.shorten(state.step_result) END;
    END IF;
    INSERT INTO pgflow_prefect.task_runs AS t (
        run_id, step_slug, task_index, task_run_id, state_name, handler, attempt)
    VALUES (claim_step.run_id, claim_step.step_slug, claim_step.task_index, claim_step.task_run_id,
            CASE WHEN skip_reason IS NOT NULL THEN 'Skipped'
                 WHEN status OPERATOR(pg_catalog.=) 'completed'
                 THEN CASE WHEN doing OPERATOR(pg_catalog.=) 'external' THEN 'Completed' ELSE 'Cached' END
                 WHEN status OPERATOR(pg_catalog.=) 'failed' THEN 'Failed'
                 WHEN NOT waits THEN 'Running'
                 WHEN task.state_name OPERATOR(pg_catalog.=) 'Deferred' THEN 'Deferred'
                 ELSE 'Waiting' END,
            CASE WHEN kind IS NULL THEN claim_step.handler ELSE pg_catalog.concat_ws(' ', kind, target) END,
            CASE WHEN NOT waits THEN attempt END)
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET task_run_id = excluded.task_run_id, state_name = excluded.state_name,
        -- A message on a queue stays valid, even if the step is bound to another handler meanwhile.
        handler = CASE WHEN excluded.state_name OPERATOR(pg_catalog.=) 'Deferred' THEN t.handler
                       ELSE excluded.handler END,
        attempt = CASE WHEN excluded.state_name OPERATOR(pg_catalog.=) 'Deferred' THEN t.attempt
                       ELSE excluded.attempt END,
        updated_at = CASE WHEN excluded.state_name OPERATOR(pg_catalog.=) 'Waiting'
                               AND t.state_name OPERATOR(pg_catalog.=) 'Waiting' THEN t.updated_at
                          ELSE pg_catalog.clock_timestamp() END;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_step(uuid, text, int, int, uuid, text[], boolean, text, boolean, text) IS
    'pgflow.claim_step for what the step is bound to, by its row, else as `bound` says; and which task run claimed '
    'it. Where an external worker does it (waits), no attempt is counted. Of a step that was skipped, the reason, and it '
    'in words (note). All NULL for a former owner.';


CREATE OR REPLACE FUNCTION pgflow_prefect.describe_skip(state pgflow.step_states) RETURNS text
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT CASE state.skip_reason
        WHEN 'condition_unmet' THEN 'its condition is not met'
        WHEN 'handler_failed' THEN 'its handler failed: ' || coalesce(state.error_message, 'no reason given')
        WHEN 'dependency_skipped' THEN 'a step that it waits for was skipped'
        WHEN 'dependency_failed' THEN 'a step that it waits for has failed'
        WHEN 'branch_not_taken' THEN format('branch not taken by "%s"', state.skipped_by)
        WHEN 'rule_unmet' THEN 'its rule is not met'
        WHEN 'requested' THEN coalesce(nullif(state.skip_note, ''), 'as requested')
        ELSE state.skip_reason END
$$;

COMMENT ON FUNCTION pgflow_prefect.describe_skip(pgflow.step_states) IS
    'Why a step was skipped, or not run, in words for people; NULL for any other step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.skip(note text DEFAULT NULL, cascade boolean DEFAULT true) RETURNS void
LANGUAGE sql VOLATILE
AS $$
    SELECT pg_catalog.set_config('pgflow_prefect.outcome', pg_catalog.jsonb_build_object(
        'skip', true, 'note', skip.note, 'cascade', coalesce(skip."cascade", true))::pg_catalog.text, true)
$$;

COMMENT ON FUNCTION pgflow_prefect.skip(text, boolean) IS
    'For a function that does a step: the step ends as skipped when the function returns, and what it wrote stays. '
    'cascade: what is below it is skipped, too.';


CREATE OR REPLACE FUNCTION pgflow_prefect.branch(taken text[], whole boolean DEFAULT false) RETURNS void
LANGUAGE sql VOLATILE
AS $$
    SELECT pg_catalog.set_config('pgflow_prefect.outcome', pg_catalog.jsonb_build_object(
        'taken', coalesce(branch.taken, '{}'), 'whole', coalesce(branch.whole, false))::pg_catalog.text, true)
$$;

COMMENT ON FUNCTION pgflow_prefect.branch(text[], boolean) IS
    'For a function that does a step: when it returns, the steps that wait for it and are not taken are skipped. whole: '
    'all that is below those, too.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_outcome(
    run_id uuid, step_slug text, step_result jsonb, epoch int, attempt int, outcome jsonb
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
BEGIN
    IF outcome IS NULL OR outcome OPERATOR(pg_catalog.?) 'cache_key' OR outcome OPERATOR(pg_catalog.?) 'cached_from' THEN
        RETURN pgflow.complete_step(run_id, step_slug, step_result, epoch, attempt);
    ELSIF outcome OPERATOR(pg_catalog.?) 'skip' THEN
        RETURN pgflow.skip_step(run_id, step_slug, outcome OPERATOR(pg_catalog.->>) 'note',
                                (outcome OPERATOR(pg_catalog.->>) 'cascade')::boolean, epoch, attempt);
    END IF;
    RETURN pgflow.take_branches(
        run_id, step_slug,
        ARRAY(SELECT t.slug FROM pg_catalog.jsonb_array_elements_text(outcome OPERATOR(pg_catalog.->) 'taken') AS t (slug)),
        step_result, (outcome OPERATOR(pg_catalog.->>) 'whole')::boolean, epoch, attempt);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.report_outcome(uuid, text, jsonb, int, int, jsonb) IS
    'Completes a step, or skips it, or completes it and takes branches: as the outcome says, NULL for the first. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_state(
    run_id uuid, step_slug text, task_index int, task_run_id uuid, state_name text, message text
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.task_runs t
    SET state_name = note_state.state_name, message = coalesce(left(note_state.message, 10100), t.message),
        updated_at = clock_timestamp()
    WHERE t.run_id = note_state.run_id AND t.step_slug = note_state.step_slug AND t.task_index = note_state.task_index
      AND t.task_run_id = note_state.task_run_id; -- a task run of another flow run may do the step now
END
$$;

COMMENT ON FUNCTION pgflow_prefect.note_state(uuid, text, int, uuid, text, text) IS
    'Notes the state in which Prefect shows the run of a task, such as AwaitingRetry.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_step(
    run_id uuid, step_slug text, task_index int, step_result jsonb, epoch int, attempt int, task_run_id uuid,
    outcome jsonb DEFAULT NULL
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    began pg_catalog.timestamptz := pg_catalog.clock_timestamp();
    state pgflow.step_states;
BEGIN
    IF (task_index OPERATOR(pg_catalog.=) 0) IS NOT TRUE THEN
        PERFORM pgflow_prefect.refuse_task(step_slug, task_index);
    END IF;
    IF outcome IS NULL THEN
        state := pgflow.complete_step(run_id, step_slug, step_result, epoch, attempt);
    ELSE
        state := pgflow_prefect.report_outcome(run_id, step_slug, step_result, epoch, attempt, outcome);
    END IF;
    -- Not this report has completed the step; its clock alone would not tell, where it has waited for the run's lock.
    IF (state.status OPERATOR(pg_catalog.=) 'completed' AND state.attempts OPERATOR(pg_catalog.=) attempt
        AND state.finished_at OPERATOR(pg_catalog.>=) began) IS NOT TRUE THEN
        PERFORM pgflow_prefect.is_stale(run_id, epoch); -- refused already; counted
    ELSIF outcome OPERATOR(pg_catalog.?) 'cache_key' THEN
        PERFORM pgflow_prefect.note_cached(run_id, step_slug, task_index, state.finished_at, outcome);
    END IF;
    IF state.status OPERATOR(pg_catalog.=) 'completed' THEN
        PERFORM pgflow_prefect.note_state(
            run_id, step_slug, task_index, task_run_id,
            CASE WHEN state.skip_reason IS NOT NULL THEN 'Skipped'
                 WHEN outcome OPERATOR(pg_catalog.?) 'cached_from' THEN 'Cached' ELSE 'Completed' END, NULL);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_step(uuid, text, int, jsonb, int, int, uuid, jsonb) IS
    'pgflow.complete_step, and the state of the task run. outcome: NULL; {"skip": true, "note", "cascade"} skips the step; '
    '{"taken": [...], "whole"} completes it and takes these branches; {"cache_key", "expires_in"} completes it, and later runs '
    'may take its result over; {"cached_from"} completes it by the result of an earlier run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_cached(
    run_id uuid, step_slug text, task_index int, finished_at timestamptz, outcome jsonb
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO pgflow_prefect.cached_results (run_id, step_slug, task_index, cache_key, finished_at, expires_at)
    SELECT note_cached.run_id, note_cached.step_slug, note_cached.task_index, outcome ->> 'cache_key',
           note_cached.finished_at,
           note_cached.finished_at + make_interval(secs => (outcome ->> 'expires_in')::double precision)
    FROM pgflow_prefect.owners o WHERE o.run_id = note_cached.run_id
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET cache_key = excluded.cache_key, finished_at = excluded.finished_at, expires_at = excluded.expires_at;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.note_cached(uuid, text, int, timestamptz, jsonb) IS
    'Notes that steps of later runs may take over the result of this one. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_cached(run_id uuid, step_slug text, task_index int, cache_key text)
RETURNS TABLE (source_run_id uuid, result jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT c.run_id, s.step_result
        FROM pgflow_prefect.cached_results c
        JOIN pgflow.runs r ON r.id = c.run_id
        JOIN pgflow.step_states s ON s.run_id = c.run_id AND s.step_slug = c.step_slug
        WHERE c.cache_key = find_cached.cache_key AND c.step_slug = find_cached.step_slug
          AND c.task_index = find_cached.task_index
          AND (c.expires_at IS NULL OR c.expires_at > clock_timestamp())
          AND r.definition_id = (SELECT own.definition_id FROM pgflow.runs own WHERE own.id = find_cached.run_id)
          AND s.status = 'completed' AND s.skip_reason IS NULL AND s.finished_at = c.finished_at
        ORDER BY c.finished_at DESC
        LIMIT 1;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_cached(uuid, text, int, text) IS
    'The latest result of this key: of the same step, in a run of the same definition that still has it, and not expired.';


CREATE OR REPLACE FUNCTION pgflow_prefect.fail_step(
    run_id uuid, step_slug text, task_index int, error_message text, epoch int, attempt int, task_run_id uuid,
    state_name text
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    state pgflow.step_states;
BEGIN
    IF (task_index OPERATOR(pg_catalog.=) 0) IS NOT TRUE THEN
        PERFORM pgflow_prefect.refuse_task(step_slug, task_index);
    END IF;
    state := pgflow.fail_step(run_id, step_slug, error_message, epoch, attempt);
    PERFORM pgflow_prefect.is_stale(run_id, epoch); -- refused already; counted
    IF state.status OPERATOR(pg_catalog.=) 'failed' THEN
        PERFORM pgflow_prefect.note_state(run_id, step_slug, task_index, task_run_id, state_name, error_message);
    ELSIF state.skip_reason IS NOT NULL THEN -- when_exhausted, or it was skipped before
        PERFORM pgflow_prefect.note_state(run_id, step_slug, task_index, task_run_id, 'Skipped', error_message);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.fail_step(uuid, text, int, text, int, int, uuid, text) IS
    'pgflow.fail_step, and the state of the task run.';


------------------------------------------------------------------------------------------------------------
-- Bindings: who does the work of a step.
------------------------------------------------------------------------------------------------------------

-- What asks for a change of a binding: who may insert here may bind steps. Nothing is stored. The trigger below does
-- what is asked with the owner's rights, after it has checked what the role that asks may do; it alone writes
-- bindings and their history. No role is granted requested_by: it is true.
CREATE OR REPLACE VIEW pgflow_prefect.binding_requests AS
SELECT NULL::text AS workflow_slug, NULL::text AS step_slug, NULL::text AS action, NULL::text AS kind,
       NULL::text AS target, NULL::jsonb AS options, NULL::text AS requested_by, NULL::boolean AS changed
WHERE false;

ALTER VIEW pgflow_prefect.binding_requests ALTER COLUMN requested_by SET DEFAULT current_user;

COMMENT ON VIEW pgflow_prefect.binding_requests IS
    'INSERT asks for a change of a binding: action bind or undo. bind_step and undo_binding do.';


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
    IF (wanted ->> 'kind' = 'external') IS NOT TRUE AND (wanted IS NOT NULL OR before IS NOT NULL)
       AND to_regclass('pgflow_prefect.airflow_dags') IS NOT NULL THEN
        IF EXISTS (SELECT FROM pgflow.steps s -- of its own: a later script creates that table
                   JOIN pgflow_prefect.airflow_dags d ON d.workflow_slug = s.workflow_slug
                   WHERE s.workflow_slug = change_binding.workflow_slug AND s.slug = change_binding.step_slug
                     AND s.step_type = 'map'
                     AND (to_jsonb(d) ->> 'removed_at' IS NULL
                          OR EXISTS (SELECT FROM pgflow.runs r -- which go on as they began
                                     WHERE r.workflow_slug = d.workflow_slug AND r.status = 'pending'
                                       AND r.payload ? 'airflow_run_id'
                                       AND r.created_at < (to_jsonb(d) ->> 'removed_at')::timestamptz))) THEN
            RAISE EXCEPTION 'step "%" of workflow "%" stays with Airflow: its mapped tasks do not ask who executes them',
                            step_slug, workflow_slug
                USING ERRCODE = 'invalid_parameter_value', CONSTRAINT = 'bindings_airflow',
                      HINT = 'Once Airflow no longer executes the DAG: pgflow-prefect airflow policy DAG --remove; and wait for '
                             'the runs that go on.';
        END IF;
    END IF;
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


CREATE OR REPLACE FUNCTION pgflow_prefect.do_binding_request() RETURNS trigger
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    change jsonb;
    undone pgflow_prefect.binding_changes;
    child_workflow text;
BEGIN
    IF TG_RELID <> 'pgflow_prefect.binding_requests'::regclass THEN
        RAISE EXCEPTION 'the trigger function pgflow_prefect.do_binding_request is for '
                        'pgflow_prefect.binding_requests, not for %', TG_RELID::regclass
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    IF pgflow.find_json_problem(NEW.options, true) IS NOT NULL OR octet_length(NEW.options::text) > 10000 THEN
        RAISE EXCEPTION 'the options of a binding of step "%" have more than 10000 bytes as text', NEW.step_slug
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    NEW.changed := false;
    PERFORM FROM pgflow.steps s -- two sessions change it one after the other
    WHERE s.workflow_slug = NEW.workflow_slug AND s.slug = NEW.step_slug FOR NO KEY UPDATE;
    IF NEW.action = 'undo' THEN
        SELECT * INTO undone FROM pgflow_prefect.binding_changes c
        WHERE c.workflow_slug = NEW.workflow_slug AND c.step_slug = NEW.step_slug AND c.undone_at IS NULL
        ORDER BY c.id DESC LIMIT 1;
        IF NOT FOUND THEN
            RETURN NEW;
        END IF;
    END IF;
    IF NOT EXISTS (SELECT FROM pgflow.steps s WHERE s.workflow_slug = NEW.workflow_slug AND s.slug = NEW.step_slug) THEN
        RAISE EXCEPTION 'workflow "%" has no step "%"', NEW.workflow_slug, NEW.step_slug USING ERRCODE = 'no_data_found';
    END IF;
    IF NEW.action = 'bind' AND NEW.kind IS NOT NULL THEN
        SELECT s.child_workflow INTO child_workflow FROM pgflow.steps s
        WHERE s.workflow_slug = NEW.workflow_slug AND s.slug = NEW.step_slug;
        IF child_workflow IS NOT NULL THEN
            RAISE EXCEPTION 'step "%" of workflow "%" can''t be bound: it is a run of workflow "%"', NEW.step_slug,
                            NEW.workflow_slug, child_workflow
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'Set its child_workflow in pgflow.steps to NULL first, or bind the steps of that workflow.';
        END IF;
    END IF;
    IF NEW.action = 'undo' THEN
        PERFORM pgflow_prefect.change_binding(NEW.workflow_slug, NEW.step_slug, undone.before, NEW.requested_by);
        UPDATE pgflow_prefect.binding_changes c
        SET undone_at = clock_timestamp(), undone_by = session_user WHERE c.id = undone.id;
        NEW.changed := true;
        RETURN NEW;
    END IF;
    change := pgflow_prefect.change_binding(
        NEW.workflow_slug, NEW.step_slug,
        CASE WHEN NEW.kind IS NOT NULL
             THEN jsonb_build_object('kind', NEW.kind, 'target', NEW.target, 'options', coalesce(NEW.options, '{}')) END,
        NEW.requested_by);
    IF change IS NOT NULL THEN
        INSERT INTO pgflow_prefect.binding_changes (workflow_slug, step_slug, before, after)
        VALUES (NEW.workflow_slug, NEW.step_slug, nullif(change -> 'before', 'null'), nullif(change -> 'after', 'null'));
        NEW.changed := true;
    END IF;
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.do_binding_request() IS
    'Does what a row of pgflow_prefect.binding_requests asks for, and records it.';


DO $triggers$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_trigger
                   WHERE tgrelid = 'pgflow_prefect.binding_requests'::regclass AND tgname = 'do_binding_request') THEN
        CREATE TRIGGER do_binding_request INSTEAD OF INSERT ON pgflow_prefect.binding_requests
            FOR EACH ROW EXECUTE FUNCTION pgflow_prefect.do_binding_request();
    END IF;
    IF to_regprocedure('pgflow_prefect.change_binding(text, text, jsonb)') IS NOT NULL THEN
        DROP FUNCTION pgflow_prefect.change_binding(text, text, jsonb); -- in version 5 it had the rights of its caller
    END IF;
END
$triggers$;


CREATE OR REPLACE FUNCTION pgflow_prefect.bind_step(
    workflow_slug text, step_slug text, kind text, target text DEFAULT NULL, options jsonb DEFAULT '{}'
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    is_changed boolean;
BEGIN
    INSERT INTO pgflow_prefect.binding_requests AS r (workflow_slug, step_slug, action, kind, target, options)
    VALUES (bind_step.workflow_slug, bind_step.step_slug, 'bind', bind_step.kind, bind_step.target, bind_step.options)
    RETURNING r.changed INTO is_changed;
    RETURN is_changed;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.bind_step(text, text, text, text, jsonb) IS
    'Binds a step from its next claim on: python, external, sql, http, queue; NULL deletes the row. False if '
    'nothing changed. For secrets, targets and options name environment variables or Prefect blocks.';


CREATE OR REPLACE FUNCTION pgflow_prefect.undo_binding(workflow_slug text, step_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    is_changed boolean;
BEGIN
    INSERT INTO pgflow_prefect.binding_requests AS r (workflow_slug, step_slug, action)
    VALUES (undo_binding.workflow_slug, undo_binding.step_slug, 'undo')
    RETURNING r.changed INTO is_changed;
    RETURN is_changed;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.undo_binding(text, text) IS
    'Undoes the last change of a step''s binding that was not undone yet; false if there is none.';


CREATE OR REPLACE FUNCTION pgflow_prefect.observe_workflow(workflow_slug text) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    changed int;
BEGIN
    PERFORM FROM pgflow.workflows w WHERE w.slug = observe_workflow.workflow_slug;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', workflow_slug USING ERRCODE = 'no_data_found';
    END IF;
    SELECT count(*) FILTER (WHERE pgflow_prefect.bind_step(s.workflow_slug, s.slug, 'external')) INTO changed
    FROM (SELECT * FROM pgflow.steps s
          WHERE s.workflow_slug = observe_workflow.workflow_slug ORDER BY s.slug) s;
    RETURN changed;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.observe_workflow(text) IS
    'Makes all steps of a workflow external: Prefect executes nothing of it, and shows everything.';


------------------------------------------------------------------------------------------------------------
-- Steps that external workers do.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.shorten(result jsonb) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    -- Of a small result, too: it may be a large one that is stored compressed.
    problem text := pgflow.find_json_problem(result, false);
BEGIN
    IF problem IS NOT NULL THEN
        RETURN 'not shown: it ' || problem;
    END IF;
    -- A statement of its own: the planner evaluates expressions of constants, even those behind a condition.
    RETURN left(result::text, 1000);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.shorten(jsonb) IS
    'As much of a result as a person needs to read.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_others(kind text, has_function boolean) RETURNS boolean
LANGUAGE sql IMMUTABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$ SELECT kind = 'external' OR (kind = 'python' AND NOT has_function) $$;

COMMENT ON FUNCTION pgflow_prefect.is_others(text, boolean) IS
    'True if the claiming process can only wait: an external worker does the step, or another process has its '
    'function.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_claimed_outside(state pgflow.step_states, task_index int) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT state.status = 'pending' AND state.started_at IS NOT NULL AND EXISTS (
        SELECT FROM pgflow_prefect.external_claims c
        WHERE c.run_id = state.run_id AND c.step_slug = state.step_slug
          AND c.task_index = is_claimed_outside.task_index AND c.attempt = state.attempts
          AND c.claimed_until > clock_timestamp())
$$;

COMMENT ON FUNCTION pgflow_prefect.is_claimed_outside(pgflow.step_states, int) IS
    'True while an external worker does this task of a step, after it claimed the task by claim_external_step.';


-- Steps that wait for an external worker to claim them: what a worker of yours polls, or is sent. A view reads
-- with the rights of its owner, and would show a role the rows that policies hide from it: it raises an error instead.
CREATE OR REPLACE VIEW pgflow_prefect.external_steps AS
SELECT s.run_id, r.workflow_slug, s.step_slug, s.created_at, r.created_at AS run_created_at
FROM pgflow.runs r
JOIN pgflow.step_states s ON s.run_id = r.id AND s.status = 'pending'
LEFT JOIN pgflow_prefect.bindings b ON b.workflow_slug = r.workflow_slug AND b.step_slug = s.step_slug
LEFT JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug AND t.task_index = 0
WHERE r.status = 'pending'
  -- Not what Airflow executes. A new installation has no rows in task_runs.
  AND t.handler IS DISTINCT FROM 'airflow'
  AND (t.run_id IS NOT NULL
       OR NOT EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m WHERE m.run_id = r.id AND NOT m.executed_here OFFSET 0))
  -- Only steps that a row or the file of handlers declares external. The file counts once a claim has read it.
  AND CASE WHEN b.kind IS NOT NULL THEN b.kind = 'external' ELSE coalesce(t.state_name = 'Waiting', false) END
  AND NOT (r.uses_rules AND pgflow_prefect.find_child_workflow(r.definition_id, s.step_slug) IS NOT NULL)
  -- If Prefect claimed the step before it became external, the step stays Prefect's until that attempt fails.
  AND (s.started_at IS NULL OR coalesce(t.state_name = 'Waiting', false)
       OR EXISTS (SELECT FROM pgflow_prefect.external_claims c
                  WHERE c.run_id = s.run_id AND c.step_slug = s.step_slug AND c.task_index = 0
                    AND c.attempt = s.attempts)
       -- Or a worker has begun items of a map, in an attempt that Prefect has not claimed. OFFSET 0: a look-up by key.
       OR (t.attempt IS DISTINCT FROM s.attempts
           AND EXISTS (SELECT FROM pgflow.step_maps m
                       WHERE m.run_id = s.run_id AND m.step_slug = s.step_slug
                         AND (m.next_item > 0 OR m.remaining < m.total) OFFSET 0)))
  AND NOT EXISTS (SELECT FROM pgflow_prefect.external_claims c
                  WHERE c.run_id = s.run_id AND c.step_slug = s.step_slug AND c.task_index = 0
                    AND c.attempt = s.attempts AND s.started_at IS NOT NULL AND c.claimed_until > clock_timestamp())
  AND CASE WHEN pgflow.is_under_policies() OR pgflow_prefect.is_under_policies()
           THEN pgflow.refuse_policies('pgflow', 'pgflow_prefect') ELSE true END;

COMMENT ON VIEW pgflow_prefect.external_steps IS
    'Pending steps that are external, and that are not claimed; a map also while workers do items of it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_external_step(
    run_id uuid, step_slug text, task_index int, lease interval
) RETURNS TABLE (attempt int, payload jsonb, upstream_results jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    IF (claim_external_step.task_index OPERATOR(pg_catalog.=) 0) IS NOT TRUE THEN
        PERFORM pgflow_prefect.refuse_task(step_slug, task_index);
    END IF;
    run := pgflow.lock_run(claim_external_step.run_id);
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    PERFORM FROM pgflow_prefect.external_steps e
    WHERE e.run_id OPERATOR(pg_catalog.=) run.id AND e.step_slug OPERATOR(pg_catalog.=) claim_external_step.step_slug
      AND NOT EXISTS (SELECT FROM pgflow.step_maps m -- its items are done one by one
                      WHERE m.run_id OPERATOR(pg_catalog.=) run.id
                        AND m.step_slug OPERATOR(pg_catalog.=) claim_external_step.step_slug
                        AND (m.next_item OPERATOR(pg_catalog.>) 0 OR m.remaining OPERATOR(pg_catalog.<) m.total) OFFSET 0);
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT c.attempt, c.payload, c.upstream_results INTO attempt, payload, upstream_results
    FROM pgflow.claim_step(run.id, claim_external_step.step_slug) c;
    INSERT INTO pgflow_prefect.external_claims AS c (run_id, step_slug, task_index, attempt, claimed_until)
    VALUES (run.id, claim_external_step.step_slug, claim_external_step.task_index, attempt,
            coalesce(pg_catalog.clock_timestamp() OPERATOR(pg_catalog.+) lease, 'infinity'))
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET attempt = excluded.attempt, claimed_until = excluded.claimed_until, claimed_by = excluded.claimed_by,
        holder = NULL, failure = NULL, is_final = NULL;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_external_step(uuid, text, int, interval) IS
    'For workers outside Prefect: counts the attempt and gives the task''s input; no row where the step is not theirs '
    '(any more). No other worker begins it until it is reported, or until the lease is over, where one is given.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_external_step(
    run_id uuid, step_slug text, lease interval DEFAULT NULL
) RETURNS TABLE (attempt int, payload jsonb, upstream_results jsonb)
LANGUAGE sql VOLATILE
AS $$
    SELECT c.attempt, c.payload, c.upstream_results
    FROM pgflow_prefect.claim_external_step(run_id, step_slug, 0, lease) c
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_external_step(uuid, text, interval) IS
    'claim_external_step for a plain step, which has one task.';


------------------------------------------------------------------------------------------------------------
-- Steps on work pools. The owner of a run hands an attempt over, and a process of the pool claims it with a lease of its
-- own. So the attempt outlives the owner. The owner decides about failures: it knows the retries.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.begin_pool_step(
    run_id uuid, step_slug text, task_index int, attempt int, holder uuid, lease double precision
) RETURNS TABLE (workflow_slug text, payload jsonb, upstream_results jsonb, logical_date timestamptz,
                 interval_start timestamptz, interval_end timestamptz)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
BEGIN
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    run := pgflow.lock_run(begin_pool_step.run_id); -- two processes come one after the other
    IF run.status OPERATOR(pg_catalog.<>) 'pending' OR NOT pgflow_prefect.claim_pool_step(
        run.id, begin_pool_step.step_slug, begin_pool_step.task_index, begin_pool_step.attempt, begin_pool_step.holder,
        begin_pool_step.lease) THEN
        RETURN;
    END IF;
    RETURN QUERY
        SELECT run.workflow_slug, i.payload, i.upstream_results, i.logical_date, i.interval_start, i.interval_end
        FROM pgflow_prefect.read_input(run.id, begin_pool_step.step_slug, begin_pool_step.task_index, NULL) i;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.begin_pool_step(uuid, text, int, int, uuid, double precision) IS
    'For a process of a work pool: claims an attempt that was handed over to a pool, for so many seconds, and returns the '
    'input. No row: no run waits for this attempt any more, or another process has it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_handed_to_pool(run_id uuid, step_slug text, task_index int, attempt int)
RETURNS boolean
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM pgflow.step_states s
        JOIN pgflow_prefect.task_runs t ON t.run_id = s.run_id AND t.step_slug = s.step_slug
        WHERE s.run_id = is_handed_to_pool.run_id AND s.step_slug = is_handed_to_pool.step_slug AND s.status = 'pending'
          AND s.attempts = is_handed_to_pool.attempt AND s.started_at IS NOT NULL
          AND t.task_index = is_handed_to_pool.task_index AND t.attempt = is_handed_to_pool.attempt
          AND t.state_name = 'Deferred' AND t.handler LIKE 'work-pool %');
END
$$;

COMMENT ON FUNCTION pgflow_prefect.is_handed_to_pool(uuid, text, int, int) IS
    'Whether a step waits for the report of this attempt, and the attempt was handed over to a work pool.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_pool_step(
    run_id uuid, step_slug text, task_index int, attempt int, holder uuid, lease double precision
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    IF NOT pgflow_prefect.is_handed_to_pool(run_id, step_slug, task_index, attempt) THEN
        RETURN false;
    END IF;
    INSERT INTO pgflow_prefect.external_claims AS c (run_id, step_slug, task_index, attempt, claimed_until, holder)
    VALUES (claim_pool_step.run_id, claim_pool_step.step_slug, claim_pool_step.task_index, claim_pool_step.attempt,
            clock_timestamp() + make_interval(secs => claim_pool_step.lease), claim_pool_step.holder)
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET attempt = excluded.attempt, claimed_until = excluded.claimed_until, claimed_by = excluded.claimed_by,
        holder = excluded.holder, failure = NULL, is_final = NULL
    -- Its own claim once more: the answer to the first one was lost.
    WHERE c.attempt <> excluded.attempt OR c.holder = excluded.holder
       OR (c.failure IS NULL AND c.claimed_until <= clock_timestamp());
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_pool_step(uuid, text, int, int, uuid, double precision) IS
    'Notes the process that does an attempt on a work pool; false where it is not to do it. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.extend_pool_step(
    run_id uuid, step_slug text, task_index int, attempt int, holder uuid, lease double precision
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.external_claims c
    SET claimed_until = clock_timestamp() + make_interval(secs => extend_pool_step.lease)
    WHERE c.run_id = extend_pool_step.run_id AND c.step_slug = extend_pool_step.step_slug
      AND c.task_index = extend_pool_step.task_index AND c.attempt = extend_pool_step.attempt
      AND c.holder = extend_pool_step.holder
      AND EXISTS (SELECT FROM pgflow.step_states s JOIN pgflow.runs r ON r.id = s.run_id
                  WHERE s.run_id = c.run_id AND s.step_slug = c.step_slug AND s.status = 'pending'
                    AND s.attempts = c.attempt AND r.status = 'pending');
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.extend_pool_step(uuid, text, int, int, uuid, double precision) IS
    'Extends the lease of a process of a work pool; false where it must stop: no run waits for its attempt any more.';


CREATE OR REPLACE FUNCTION pgflow_prefect.end_pool_step(
    run_id uuid, step_slug text, task_index int, attempt int, holder uuid, failure text, is_final boolean
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.external_claims c
    SET claimed_until = least(c.claimed_until, clock_timestamp()), holder = NULL,
        failure = left(end_pool_step.failure, 10100), is_final = end_pool_step.is_final
    WHERE c.run_id = end_pool_step.run_id AND c.step_slug = end_pool_step.step_slug
      AND c.task_index = end_pool_step.task_index AND c.attempt = end_pool_step.attempt
      AND (end_pool_step.holder IS NULL OR c.holder = end_pool_step.holder);
    RETURN FOUND;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.end_pool_step(uuid, text, int, int, uuid, text, boolean) IS
    'Ends the lease of a process of a work pool, which may say why its attempt has failed. Without a holder, the owner of '
    'the run takes the attempt back from any process.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_pool_steps(
    run_ids uuid[], step_slugs text[], task_indexes int[], attempts int[]
) RETURNS TABLE (place int, is_awaited boolean, has_begun boolean, is_live boolean, failure text, is_final boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT w.place::int, pgflow_prefect.is_handed_to_pool(w.run_id, w.step_slug, w.task_index, w.attempt),
               c.run_id IS NOT NULL, coalesce(c.claimed_until > clock_timestamp(), false), c.failure,
               coalesce(c.is_final, false)
        FROM unnest(run_ids, step_slugs, task_indexes, attempts)
             WITH ORDINALITY AS w (run_id, step_slug, task_index, attempt, place)
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow_prefect.external_claims c
            WHERE c.run_id = w.run_id AND c.step_slug = w.step_slug AND c.task_index = w.task_index
              AND c.attempt = w.attempt OFFSET 0) c ON true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.read_pool_steps(uuid[], text[], int[], int[]) IS
    'For each of these attempts, by its place from 1 on: whether a report of it is awaited from a work pool, whether a '
    'process has begun it, whether its lease holds, and why it has failed.';


CREATE OR REPLACE FUNCTION pgflow_prefect.choose_external_steps(workflow_slug text, only_step text, wanted int)
RETURNS TABLE (run_id uuid, step_slug text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT e.run_id, e.step_slug FROM pgflow_prefect.external_steps e
        JOIN pgflow.runs r ON r.id = e.run_id
        WHERE e.workflow_slug = choose_external_steps.workflow_slug
          AND (only_step IS NULL OR e.step_slug = only_step)
          AND NOT EXISTS (SELECT FROM pgflow.step_maps m -- as in claim_external_step
                          WHERE m.run_id = e.run_id AND m.step_slug = e.step_slug
                            AND (m.next_item > 0 OR m.remaining < m.total) OFFSET 0)
        ORDER BY e.run_created_at, e.created_at -- in the order of the runs' index
        LIMIT wanted -- every fetched row is locked
        FOR NO KEY UPDATE OF r SKIP LOCKED; -- others who look at this moment take others
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_external_steps(text, text, int) IS
    'Locks the runs of steps for take_external_steps, and returns the steps. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_external_steps(
    workflow_slug text, only_step text DEFAULT NULL, wanted int DEFAULT 1, lease interval DEFAULT NULL
) RETURNS TABLE (run_id uuid, step_slug text, attempt int, payload jsonb, upstream_results jsonb)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    candidate pg_catalog.record;
    claimed pg_catalog.record;
    open_places int := wanted;
BEGIN
    IF wanted IS NULL OR wanted OPERATOR(pg_catalog.<) 0 THEN
        RAISE EXCEPTION 'can''t take % steps', coalesce(wanted::pg_catalog.text, 'NULL')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Say how many at most: a number of 0 or more.';
    END IF;
    IF pgflow_prefect.is_under_policies() THEN
        PERFORM pgflow.refuse_policies('pgflow', 'pgflow_prefect');
    END IF;
    FOR candidate IN
        SELECT * FROM pgflow_prefect.choose_external_steps(workflow_slug, only_step, wanted)
    LOOP
        EXIT WHEN open_places OPERATOR(pg_catalog.<=) 0;
        FOR claimed IN SELECT * FROM pgflow_prefect.claim_external_step(
            candidate.run_id, candidate.step_slug, 0, lease)
        LOOP
            run_id := candidate.run_id;
            step_slug := candidate.step_slug;
            attempt := claimed.attempt;
            payload := claimed.payload;
            upstream_results := claimed.upstream_results;
            open_places := open_places OPERATOR(pg_catalog.-) 1;
            RETURN NEXT;
        END LOOP;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_external_steps(text, text, int, interval) IS
    'claim_external_step for the oldest steps that wait, at most so many: of a workflow, or of one of its steps.';


CREATE OR REPLACE FUNCTION pgflow_prefect.watch_steps(
    run_ids uuid[], step_slugs text[], task_indexes int[], epochs int[], task_run_ids uuid[], bound text[],
    have_function boolean[]
) RETURNS TABLE (task_run_id uuid, outcome text, message text, began_at timestamptz, ended_at timestamptz)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    seen record;
BEGIN
    -- OFFSET 0: the look-up of each task by its key is no join. The planner reads whole tables for a join where it has
    -- statistics of one table and none of another.
    FOR seen IN
        SELECT w.run_id, w.step_slug, w.task_index, w.task_run_id, s.status, s.error_message, r.error_message AS reason,
               CASE WHEN s.status = 'failed' THEN s.error_message END AS cancel_reason,
               CASE WHEN s.skip_reason IS NOT NULL THEN pgflow_prefect.describe_skip(s)
                    WHEN s.status = 'completed' THEN pgflow_prefect.shorten(s.step_result) END AS result,
               coalesce(s.started_at, s.created_at) AS began_at, s.finished_at AS ended_at,
               CASE WHEN s.status = 'failed' AND s.ended_as = 'cancelled' THEN 'ended'
                    WHEN s.status = 'completed' AND s.skip_reason IS NOT NULL THEN 'skipped'
                    WHEN s.status <> 'pending' THEN s.status
                    WHEN r.epoch IS DISTINCT FROM w.epoch THEN 'lost'
                    WHEN r.status <> 'pending' THEN 'ended'
                    WHEN t.state_name <> 'Deferred'
                         AND NOT pgflow_prefect.is_others(coalesce(b.kind, w.bound), w.has_function)
                         AND NOT (r.uses_rules AND pgflow_prefect.find_child_workflow(r.definition_id, w.step_slug) IS NOT NULL)
                         AND NOT coalesce(
                             (SELECT pgflow_prefect.is_claimed_outside(c, w.task_index) FROM pgflow.step_states c
                              WHERE c.run_id = w.run_id AND c.step_slug = w.step_slug), false)
                    THEN 'rebound' END AS outcome
        FROM unnest(run_ids, step_slugs, task_indexes, epochs, task_run_ids, bound, have_function)
             AS w (run_id, step_slug, task_index, epoch, task_run_id, bound, has_function)
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow.runs r WHERE r.id = w.run_id OFFSET 0) r ON true
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow.step_states s
            WHERE s.run_id = w.run_id AND s.step_slug = w.step_slug OFFSET 0) s ON true
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow_prefect.task_runs t
            WHERE t.run_id = w.run_id AND t.step_slug = w.step_slug AND t.task_index = w.task_index OFFSET 0) t ON true
        LEFT JOIN LATERAL (
            SELECT * FROM pgflow_prefect.bindings b
            WHERE b.workflow_slug = r.workflow_slug AND b.step_slug = w.step_slug OFFSET 0) b ON true
    LOOP
        CONTINUE WHEN seen.outcome IS NULL;
        task_run_id := seen.task_run_id;
        outcome := seen.outcome;
        message := CASE WHEN outcome IN ('completed', 'skipped') THEN seen.result
                        WHEN outcome = 'failed' THEN seen.error_message
                        WHEN outcome = 'ended' THEN coalesce(seen.cancel_reason, seen.reason) END;
        began_at := seen.began_at;
        ended_at := seen.ended_at;
        IF outcome IN ('completed', 'skipped', 'failed', 'ended') THEN -- reopened, it does not count as waiting since then
            PERFORM pgflow_prefect.note_state(seen.run_id, seen.step_slug, seen.task_index, seen.task_run_id,
                                              CASE outcome WHEN 'ended' THEN 'Cancelled' ELSE initcap(outcome) END,
                                              NULL);
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.watch_steps(uuid[], text[], int[], int[], uuid[], text[], boolean[]) IS
    'Looks at tasks that others do and returns those for which the waiting is over: completed, skipped, failed, lost (the run '
    'was taken), ended (the run was), rebound (from now on the one who waits is to do it).';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_input(run_id uuid, step_slug text, task_index int, upstream text[])
RETURNS TABLE (payload jsonb, upstream_results jsonb, logical_date timestamptz, interval_start timestamptz,
               interval_end timestamptz)
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT r.payload, coalesce(
        (SELECT jsonb_object_agg(s.step_slug, s.step_result)
         FROM pgflow.definition_deps d
         JOIN pgflow.step_states s ON s.run_id = r.id AND s.step_slug = d.from_step_slug AND s.status = 'completed'
                                  AND s.skip_reason IS NULL
         WHERE d.definition_id = r.definition_id AND d.to_step_slug = read_input.step_slug
           AND (read_input.upstream IS NULL OR d.from_step_slug = ANY (read_input.upstream))), '{}'),
        r.logical_date, lower(r.data_interval), upper(r.data_interval)
    FROM pgflow.runs r WHERE r.id = read_input.run_id AND read_input.task_index = 0
$$;

COMMENT ON FUNCTION pgflow_prefect.read_input(uuid, text, int, text[]) IS
    'What a claim would give, without claiming: for a handler that runs beside an external worker.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_shadow(
    run_id uuid, step_slug text, task_index int, outcome text, details text[], seconds double precision
) RETURNS void
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    INSERT INTO pgflow_prefect.shadow_reports AS s (
        run_id, workflow_slug, step_slug, task_index, outcome, details, seconds)
    SELECT r.id, r.workflow_slug, report_shadow.step_slug, report_shadow.task_index, report_shadow.outcome,
           report_shadow.details, report_shadow.seconds
    FROM pgflow.runs r WHERE r.id = report_shadow.run_id
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET outcome = excluded.outcome, details = excluded.details, seconds = excluded.seconds,
        reported_at = clock_timestamp()
$$;

COMMENT ON FUNCTION pgflow_prefect.report_shadow(uuid, text, int, text, text[], double precision) IS
    'Notes the comparison of a handler with an external worker: same, different, failed.';


------------------------------------------------------------------------------------------------------------
-- Signatures of version 6, which knew no index of a task: a worker of that version goes on while `init` upgrades.
-- They stay for one version: version 8 drops them.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.is_claimed_outside(state pgflow.step_states) RETURNS boolean
LANGUAGE sql STABLE
AS $$ SELECT pgflow_prefect.is_claimed_outside(state, 0) $$;

COMMENT ON FUNCTION pgflow_prefect.is_claimed_outside(pgflow.step_states) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_step(
    run_id uuid, step_slug text, epoch int, task_run_id uuid, upstream text[], with_payload boolean, bound text,
    has_function boolean, handler text
) RETURNS TABLE (status text, attempt int, payload jsonb, upstream_results jsonb,
                 kind text, target text, options jsonb, waits boolean, waited double precision,
                 began_at timestamptz, ended_at timestamptz, note text)
LANGUAGE sql VOLATILE
AS $$
    SELECT c.status, c.attempt, c.payload, c.upstream_results, c.kind, c.target, c.options, c.waits, c.waited, c.began_at,
           c.ended_at, c.note
    FROM pgflow_prefect.claim_step(
        run_id, step_slug, 0, epoch, task_run_id, upstream, with_payload, bound, has_function, handler) c
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_step(uuid, text, int, uuid, text[], boolean, text, boolean, text) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_state(
    run_id uuid, step_slug text, task_run_id uuid, state_name text, message text DEFAULT NULL
) RETURNS void
LANGUAGE sql VOLATILE
AS $$ SELECT pgflow_prefect.note_state(run_id, step_slug, 0, task_run_id, state_name, message) $$;

COMMENT ON FUNCTION pgflow_prefect.note_state(uuid, text, uuid, text, text) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_step(
    run_id uuid, step_slug text, step_result jsonb, epoch int, attempt int, task_run_id uuid
) RETURNS pgflow.step_states
LANGUAGE sql VOLATILE
AS $$ SELECT pgflow_prefect.complete_step(run_id, step_slug, 0, step_result, epoch, attempt, task_run_id) $$;

COMMENT ON FUNCTION pgflow_prefect.complete_step(uuid, text, jsonb, int, int, uuid) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.fail_step(
    run_id uuid, step_slug text, error_message text, epoch int, attempt int, task_run_id uuid, state_name text
) RETURNS pgflow.step_states
LANGUAGE sql VOLATILE
AS $$ SELECT pgflow_prefect.fail_step(run_id, step_slug, 0, error_message, epoch, attempt, task_run_id, state_name) $$;

COMMENT ON FUNCTION pgflow_prefect.fail_step(uuid, text, text, int, int, uuid, text) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_and_claim(
    run_id uuid, epoch int, completions jsonb, claims jsonb
) RETURNS TABLE (status text, error_message text, attempt int, payload jsonb, upstream_results jsonb,
                 kind text, target text, options jsonb, waits boolean, waited double precision,
                 began_at timestamptz, ended_at timestamptz, note text)
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    completion pg_catalog.record;
    claim pg_catalog.record;
    state pgflow.step_states;
BEGIN
    -- One after the other. A transaction never waits for its own lock on the run's row. The claims come last, because the
    -- completions may make their steps ready.
    FOR completion IN
        SELECT * FROM pg_catalog.jsonb_to_recordset(completions) AS c(
            step_slug pg_catalog.text, result pg_catalog.jsonb, attempt int, task_run_id pg_catalog.uuid)
    LOOP
        state := pgflow_prefect.complete_step(complete_and_claim.run_id, completion.step_slug,
                                              coalesce(completion.result, 'null'), complete_and_claim.epoch,
                                              completion.attempt, completion.task_run_id);
        status := state.status;
        error_message := state.error_message;
        RETURN NEXT;
    END LOOP;
    FOR claim IN
        SELECT * FROM pg_catalog.jsonb_to_recordset(claims) AS c(
            step_slug pg_catalog.text, task_run_id pg_catalog.uuid, upstream pg_catalog.text[], with_payload boolean,
            bound pg_catalog.text, has_function boolean, handler pg_catalog.text)
    LOOP
        RETURN QUERY
        SELECT c.status, NULL::pg_catalog.text, c.attempt, c.payload, c.upstream_results, c.kind, c.target, c.options,
               c.waits, c.waited, c.began_at, c.ended_at, c.note
        FROM pgflow_prefect.claim_step(complete_and_claim.run_id, claim.step_slug, complete_and_claim.epoch,
                                       claim.task_run_id, claim.upstream, claim.with_payload, claim.bound,
                                       claim.has_function, claim.handler) c;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_and_claim(uuid, int, jsonb, jsonb) IS
    'Signature of version 6, for plain steps: perform_tasks takes its place.';


CREATE OR REPLACE FUNCTION pgflow_prefect.watch_steps(
    run_ids uuid[], step_slugs text[], epochs int[], task_run_ids uuid[], bound text[], have_function boolean[]
) RETURNS TABLE (task_run_id uuid, outcome text, message text, began_at timestamptz, ended_at timestamptz)
LANGUAGE sql VOLATILE
AS $$
    SELECT w.task_run_id, pg_catalog."replace"(w.outcome, 'skipped', 'completed'), w.message, w.began_at, w.ended_at
    FROM pgflow_prefect.watch_steps(
        run_ids, step_slugs, pg_catalog.array_fill(0, ARRAY[pg_catalog.cardinality(run_ids)]), epochs, task_run_ids,
        bound, have_function) w
$$;

COMMENT ON FUNCTION pgflow_prefect.watch_steps(uuid[], text[], int[], uuid[], text[], boolean[]) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.read_input(run_id uuid, step_slug text, upstream text[])
RETURNS TABLE (payload jsonb, upstream_results jsonb)
LANGUAGE sql STABLE
AS $$ SELECT i.payload, i.upstream_results FROM pgflow_prefect.read_input(run_id, step_slug, 0, upstream) i $$;

COMMENT ON FUNCTION pgflow_prefect.read_input(uuid, text, text[]) IS
    'Signature of version 6, for a plain step.';


CREATE OR REPLACE FUNCTION pgflow_prefect.report_shadow(
    run_id uuid, step_slug text, outcome text, details text[], seconds double precision
) RETURNS void
LANGUAGE sql VOLATILE
AS $$ SELECT pgflow_prefect.report_shadow(run_id, step_slug, 0, outcome, details, seconds) $$;

COMMENT ON FUNCTION pgflow_prefect.report_shadow(uuid, text, text, text[], double precision) IS
    'Signature of version 6, for a plain step.';


------------------------------------------------------------------------------------------------------------
-- Old runs. The owner of the tables calls these, by `pgflow-prefect prune` or from pg_cron.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.is_let_go(run_id uuid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT NOT EXISTS (SELECT FROM pgflow_prefect.owners o WHERE o.run_id = is_let_go.run_id
                       AND (NOT o.settled OR o.lease_until > clock_timestamp()))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_let_go(uuid) IS
    'True if no process holds a run that has ended, and Prefect is known to show its end, or was never told of '
    'it.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_prunable(
    ended_before timestamptz, workflow_slugs text[], only_status text
) RETURNS TABLE (workflow_slug text, status text)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT w.slug, s.status
        FROM pgflow.workflows w
        CROSS JOIN (VALUES ('completed'), ('failed')) AS s (status)
        CROSS JOIN LATERAL (
            SELECT r.finished_at FROM pgflow.runs r
            WHERE r.workflow_slug = w.slug AND r.status = s.status AND r.status <> 'pending'
              AND r.finished_at < ended_before
            ORDER BY r.finished_at LIMIT 1) oldest
        WHERE (workflow_slugs IS NULL OR w.slug = ANY (workflow_slugs))
          AND (only_status IS NULL OR s.status = only_status)
        ORDER BY oldest.finished_at;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_prunable(timestamptz, text[], text) IS
    'The workflows, and the statuses of their runs, that have runs to prune; those with the oldest first. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.choose_prunable(
    workflow_slug text, status text, ended_before timestamptz, grace interval, at_most int
) RETURNS uuid[]
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN (SELECT array_agg(chosen.id) FROM (
        SELECT r.id FROM pgflow.runs r
        WHERE r.workflow_slug = choose_prunable.workflow_slug AND r.status = choose_prunable.status
          AND r.status <> 'pending' AND r.finished_at < ended_before
          AND (r.finished_at < ended_before - grace OR pgflow_prefect.is_let_go(r.id))
          AND (r.parent_run_id IS NULL -- a child goes with its parent, or after it
               OR NOT EXISTS (SELECT FROM pgflow.runs p WHERE p.id = r.parent_run_id AND p.status = 'pending' OFFSET 0))
          -- A run that was imported from Airflow has that one's times. It stays until it is as old in this database.
          AND NOT EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m
                          WHERE m.run_id = r.id AND m.mirrored_at >= ended_before OFFSET 0) -- as in closes_cycle
        ORDER BY r.finished_at
        LIMIT at_most
        FOR UPDATE SKIP LOCKED -- skip runs that another session prunes or reopens
    ) chosen);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.choose_prunable(text, text, timestamptz, interval, int) IS
    'Locks runs for prune_runs, and returns their ids. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.prune_runs(
    older_than interval, at_most int DEFAULT 1000, workflow_slugs text[] DEFAULT NULL, only_status text DEFAULT NULL,
    grace interval DEFAULT '1 day'
) RETURNS int
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    ended_before pg_catalog.timestamptz := pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) older_than;
    among pg_catalog.record;
    chosen pg_catalog.uuid[];
    one pg_catalog.uuid;
    pruned int := 0;
BEGIN
    IF older_than IS NULL OR older_than OPERATOR(pg_catalog.<=) '0' OR at_most IS NULL
       OR at_most OPERATOR(pg_catalog.<) 1 OR grace IS NULL OR grace OPERATOR(pg_catalog.<) '0' THEN
        RAISE EXCEPTION 'can''t prune at most % runs older than %', at_most, older_than
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Both have to be more than nothing.';
    ELSIF only_status OPERATOR(pg_catalog.<>) ALL ('{completed,failed}'::pg_catalog.text[]) THEN
        RAISE EXCEPTION 'runs that are "%" are not pruned', only_status
            USING ERRCODE = 'invalid_parameter_value', HINT = 'completed or failed; NULL for both.';
    END IF;
    IF pgflow.is_under_policies() THEN
        PERFORM pgflow.refuse_policies();
    END IF;
    -- By workflow and status, as the index is sorted: a batch reads only the rows that it deletes.
    FOR among IN
        SELECT * FROM pgflow_prefect.find_prunable(ended_before, workflow_slugs, only_status)
    LOOP
        chosen := pgflow_prefect.choose_prunable(among.workflow_slug, among.status, ended_before, grace,
                                                 at_most OPERATOR(pg_catalog.-) pruned);
        CONTINUE WHEN chosen IS NULL;
        -- One run at a time: for a list of runs, the planner may read the whole table.
        FOREACH one IN ARRAY chosen LOOP
            DELETE FROM pgflow.step_states s WHERE s.run_id OPERATOR(pg_catalog.=) one;
            DELETE FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) one;
        END LOOP;
        pruned := pruned OPERATOR(pg_catalog.+) pg_catalog.cardinality(chosen);
        EXIT WHEN pruned OPERATOR(pg_catalog.>=) at_most;
    END LOOP;
    RETURN pruned;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.prune_runs(interval, int, text[], text, interval) IS
    'Deletes runs that ended longer ago than that, with all that is theirs, and returns how many: fewer than `at_most`, '
    'and there are no more. One that a process holds, or whose end Prefect was not yet seen to show, stays for `grace` '
    'longer; one without finished_at stays. Several may prune at once.';


-- No SET clause: triggers of users on the two tables run inside.
CREATE OR REPLACE FUNCTION pgflow_prefect.prune_run(run_id uuid) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    run pgflow.runs := pgflow.lock_run(prune_run.run_id);
BEGIN
    IF run.status OPERATOR(pg_catalog.=) 'pending' THEN
        RAISE EXCEPTION 'run % is pending, and only runs that have ended are deleted', run.id
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = 'End it first: pgflow-prefect cancel, or SELECT pgflow.cancel_run(run_id, reason).';
    END IF;
    DELETE FROM pgflow.step_states s WHERE s.run_id OPERATOR(pg_catalog.=) run.id;
    DELETE FROM pgflow.runs r WHERE r.id OPERATOR(pg_catalog.=) run.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.prune_run(uuid) IS
    'Deletes one run that has ended, at any age, with all its rows.';


CREATE OR REPLACE FUNCTION pgflow_prefect.prune_definitions(
    workflow_slugs text[] DEFAULT NULL, grace interval DEFAULT '1 day'
) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    outdated bigint[];
    pruned int;
BEGIN
    SELECT array_agg(d.id) INTO outdated
    FROM pgflow.definitions d
    JOIN pgflow.workflows w ON w.slug = d.workflow_slug AND w.version > d.version
    WHERE (workflow_slugs IS NULL OR d.workflow_slug = ANY (workflow_slugs))
      -- A transaction from before the edit may be starting a run with it, which this session can't see yet.
      AND EXISTS (SELECT FROM pgflow.definitions n
                  WHERE n.workflow_slug = d.workflow_slug AND n.version > d.version
                    AND n.created_at < clock_timestamp() - grace);
    IF outdated IS NULL THEN
        RETURN 0; -- without reading all runs
    END IF;
    DELETE FROM pgflow.definitions d
    WHERE d.id IN (SELECT unnest(outdated)
                   EXCEPT SELECT r.definition_id FROM pgflow.runs r WHERE r.definition_id = ANY (outdated));
    GET DIAGNOSTICS pruned = ROW_COUNT;
    RETURN pruned;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.prune_definitions(text[], interval) IS
    'Deletes snapshots that no run refers to and that a newer one has replaced for `grace`; returns how many. Reads '
    'the runs once, if there is any snapshot to look for.';


CREATE OR REPLACE FUNCTION pgflow_prefect.find_gone_runs(run_ids uuid[]) RETURNS SETOF uuid
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_custom_plan
AS $$
BEGIN
    RETURN QUERY
        SELECT asked.id FROM unnest(run_ids) AS asked (id)
        WHERE NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.id = asked.id);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_gone_runs(uuid[]) IS
    'Those of these runs that have no row any more: nothing refers to their results in a storage.';


UPDATE pgflow_prefect.installation SET stamp = pgflow_prefect.current_stamp() WHERE stamp IS NULL;
DO $copied$ BEGIN PERFORM pgflow_prefect.claim_installation(); END $copied$;


DO $rights$
BEGIN
    -- Version 5 left functions to PUBLIC if their owner had default privileges.
    PERFORM pgflow.close_schema('pgflow_prefect', also_known => current_setting('pgflow.former_version')::int < 6);
    PERFORM pgflow.hand_on_rights('pgflow_prefect.owners', '{SELECT,INSERT,UPDATE,DELETE}', 'pgflow_prefect.set_aside_runs',
                                  'pgflow_prefect.cached_results', 'pgflow_prefect.heartbeats', 'pgflow_prefect.mirrors',
                                  'pgflow_prefect.mirrored_runs');
END
$rights$;

COMMIT;
