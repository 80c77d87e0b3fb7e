-- pgflow_prefect: what the adapter between pgflow and Prefect keeps for itself.
--
-- Which flow run may write for a run and until when, which task run does a step, which workflows workers and
-- bridges serve. Needs pgflow.sql, changes nothing in it.
-- psql -d DATABASE -f pgflow_prefect.sql; one transaction, safe to run again.

BEGIN;

SET LOCAL lock_timeout = '10s';
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow.definitions') IS NULL THEN
        RAISE EXCEPTION 'the schema pgflow is missing or old' USING HINT = 'Run pgflow.sql first.';
    END IF;
    PERFORM pg_catalog.pg_advisory_xact_lock(7031902210563);
END
$guard$;

CREATE SCHEMA IF NOT EXISTS pgflow_prefect;

-- A run's owner: the one who may write for it, in the run's epoch. An older epoch than the run's is history.
-- lease_until: -infinity where the owner has let go of it, infinity while its flow run waits in Prefect's queue.
CREATE TABLE IF NOT EXISTS pgflow_prefect.owners (
    run_id UUID PRIMARY KEY REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    epoch INT NOT NULL,
    flow_run_id UUID,              -- NULL while it is being created
    held_by TEXT NOT NULL,         -- who, for people: host and process
    lease_until TIMESTAMPTZ NOT NULL,
    remaining INT,                 -- of the run's steps when it was taken: less than that now is progress
    recoveries INT NOT NULL DEFAULT 0,
    stale_writes BIGINT NOT NULL DEFAULT 0, -- claims and reports of former owners that were refused
    settled BOOLEAN NOT NULL DEFAULT false, -- the run has ended, and Prefect shows what its rows say
    taken_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 70);

-- The workflows whose runs workers and bridges take: those begun since then.
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

-- A step's latest task run, and the state that Prefect shows it in.
CREATE TABLE IF NOT EXISTS pgflow_prefect.task_runs (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    task_run_id UUID NOT NULL,
    state_name TEXT NOT NULL,
    message TEXT,                  -- of the latest attempt that failed and is tried again
    updated_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug)
);

DO $columns$
BEGIN
    IF to_regclass('pgflow_prefect.flow_runs_by_id') IS NULL THEN
        CREATE INDEX flow_runs_by_id ON pgflow_prefect.flow_runs (flow_run_id);
    END IF;
    IF to_regclass('pgflow_prefect.owners_unsettled') IS NULL THEN
        CREATE INDEX owners_unsettled ON pgflow_prefect.owners (run_id) WHERE NOT settled;
    END IF;
    IF to_regprocedure('pgflow_prefect.take_run(uuid, uuid)') IS NOT NULL THEN
        DROP FUNCTION pgflow_prefect.take_run(uuid, uuid); -- version 1 knew no leases
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_class
                   WHERE oid = 'pgflow_prefect.task_runs'::regclass AND 'fillfactor=70' = ANY (reloptions)) THEN
        ALTER TABLE pgflow_prefect.task_runs SET (fillfactor = 70); -- a state's change is an update in place
    END IF;
END
$columns$;

CREATE OR REPLACE FUNCTION pgflow_prefect.adapter_version() RETURNS int
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$ SELECT 2 $$;

COMMENT ON FUNCTION pgflow_prefect.adapter_version() IS 'Version of this script: a higher one upgrades a lower one.';


------------------------------------------------------------------------------------------------------------
-- Ownership. Whoever takes a run gets the next epoch, and everything that carries an older one is refused: that is
-- what keeps two writers apart. A lease only says when somebody else may take it.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.is_leased(lease_until timestamptz, lease double precision) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    -- While this server was down nobody could extend a lease: its return must not start a storm of takeovers.
    SELECT lease_until > clock_timestamp()
        OR (lease_until > '-infinity' AND clock_timestamp() < pg_postmaster_start_time() + make_interval(secs => lease))
$$;

COMMENT ON FUNCTION pgflow_prefect.is_leased(timestamptz, double precision) IS
    'True while a lease holds; for one lease length (in seconds) after the server''s start, every lease does.';


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
    'How the owner holds a run that is in this epoch: leased, queued in Prefect, expired, or released; NULL: never.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_run(
    run_id uuid, flow_run_id uuid, held_by text, lease double precision, max_recoveries int,
    force boolean DEFAULT false
) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
    owner pgflow_prefect.owners;
    taken int;
    recoveries int := 0;
BEGIN
    IF run.status <> 'pending' THEN
        RETURN NULL;
    END IF;
    SELECT * INTO owner FROM pgflow_prefect.owners o WHERE o.run_id = run.id FOR UPDATE;
    IF owner.epoch = run.epoch THEN -- else it was reopened, or taken by hand: whoever had it has lost it
        IF pgflow_prefect.is_leased(owner.lease_until, lease) AND NOT force
           -- Reserved for a flow run that is being created: this may be that one.
           AND (take_run.flow_run_id IS NULL OR owner.flow_run_id <> take_run.flow_run_id) THEN
            RAISE EXCEPTION 'run % is held by %', run.id, owner.held_by
                USING ERRCODE = 'object_not_in_prerequisite_state', CONSTRAINT = 'owners_lease',
                      HINT = format('Its lease ends at %s, unless it is extended.', owner.lease_until);
        END IF;
        recoveries := owner.recoveries;
        IF owner.flow_run_id IS NULL AND NOT pgflow_prefect.is_leased(owner.lease_until, lease) THEN
            -- Reserved, and nobody has begun to execute it: the same epoch again, so that a flow run which was
            -- created under its idempotency key, though the answer was lost, is found and not made twice.
            taken := run.epoch;
        ELSIF pgflow_prefect.how_held(owner, run.epoch, lease) = 'expired' THEN
            recoveries := CASE WHEN run.remaining < owner.remaining THEN 0 ELSE owner.recoveries + 1 END;
        END IF;
        IF recoveries > max_recoveries THEN
            PERFORM pgflow.cancel_run(run.id, format(
                'given up: %s owners in a row have vanished while no further step completed, the last one was %s',
                recoveries, owner.held_by));
            RETURN NULL;
        END IF;
    END IF;
    taken := coalesce(taken, pgflow.take_run(run.id));
    INSERT INTO pgflow_prefect.owners AS o (run_id, epoch, flow_run_id, held_by, lease_until, remaining, recoveries)
    VALUES (run.id, taken, take_run.flow_run_id, take_run.held_by, clock_timestamp() + make_interval(secs => lease),
            run.remaining, recoveries)
    ON CONFLICT (run_id) DO UPDATE
    SET epoch = excluded.epoch, flow_run_id = excluded.flow_run_id, held_by = excluded.held_by,
        lease_until = excluded.lease_until, remaining = excluded.remaining, recoveries = excluded.recoveries,
        settled = false, taken_at = clock_timestamp();
    PERFORM pgflow_prefect.note_flow_run(run.id, taken, take_run.flow_run_id);
    RETURN taken;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_run(uuid, uuid, text, double precision, int, boolean) IS
    'Makes a flow run the owner of a pending run for `lease` seconds and returns the new epoch; NULL where the run '
    'has ended, or ends now because too many owners vanished. Without a flow run: reserves it for one to be created. '
    'A run that somebody else holds is refused, unless forced.';


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
    max_recoveries int
) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
BEGIN
    -- One transaction: between starting a run and taking it, a worker that heard of it could take it.
    PERFORM pgflow.run_workflow(workflow_slug, payload, run_id);
    RETURN pgflow_prefect.take_run(run_id, flow_run_id, held_by, lease, max_recoveries);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.create_run(text, jsonb, uuid, uuid, text, double precision, int) IS
    'pgflow.run_workflow and take_run in one.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_runs(
    workflow_slugs text[], wanted int, adopt boolean, held_by text, lease double precision, max_recoveries int
) RETURNS TABLE (run_id uuid, workflow_slug text, epoch int, former_flow_run_id uuid)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off
AS $$
#variable_conflict use_column
DECLARE
    candidate record;
    open_slots int := wanted;
BEGIN
    FOREACH workflow_slug IN ARRAY workflow_slugs LOOP -- one by one, each in the order of the index
        FOR candidate IN
            SELECT r.id, CASE WHEN o.epoch = r.epoch THEN o.flow_run_id END AS former_flow_run_id
            FROM pgflow.runs r
            JOIN pgflow_prefect.enabled_workflows e ON e.workflow_slug = r.workflow_slug AND e.enabled
            LEFT JOIN pgflow_prefect.owners o ON o.run_id = r.id
            WHERE r.workflow_slug = take_runs.workflow_slug AND r.status = 'pending'
              AND CASE WHEN o.run_id IS NULL THEN adopt OR r.created_at >= e.since
                       ELSE o.epoch <> r.epoch OR NOT pgflow_prefect.is_leased(o.lease_until, lease) END
            ORDER BY r.created_at
            LIMIT open_slots
            FOR NO KEY UPDATE OF r SKIP LOCKED -- others who look at this moment take others
        LOOP
            BEGIN
                epoch := pgflow_prefect.take_run(candidate.id, NULL, held_by, lease, max_recoveries);
            EXCEPTION WHEN object_not_in_prerequisite_state THEN
                CONTINUE; -- its owner was late, and has extended the lease a moment ago
            END;
            CONTINUE WHEN epoch IS NULL;
            run_id := candidate.id;
            former_flow_run_id := candidate.former_flow_run_id;
            open_slots := open_slots - 1;
            RETURN NEXT;
        END LOOP;
        EXIT WHEN open_slots <= 0;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_runs(text[], int, boolean, text, double precision, int) IS
    'Reserves pending runs that nobody holds, the oldest first, at most so many: of enabled workflows, begun since '
    'they were enabled (adopt: older ones, too).';


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
      AND o.held_by = link_flow_run.held_by; -- a reservation that ran out keeps its epoch, but not its holder
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
    'Names the flow run that a reserved run was reserved for (queued: the lease has no end, Prefect decides when it '
    'starts); false where somebody else has taken the run meanwhile.';


CREATE OR REPLACE FUNCTION pgflow_prefect.extend_leases(
    run_ids uuid[], epochs int[], lease double precision
) RETURNS TABLE (run_id uuid, epoch int, holds text)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.owners o
    SET lease_until = clock_timestamp() + make_interval(secs => lease)
    FROM unnest(run_ids, epochs) AS held (run_id, epoch)
    WHERE o.run_id = held.run_id AND o.epoch = held.epoch;
    RETURN QUERY
        SELECT held.run_id, held.epoch,
               CASE WHEN r.epoch IS DISTINCT FROM held.epoch THEN 'lost'
                    WHEN r.status = 'pending' THEN 'held'
                    -- A failed run's claimed steps may still finish.
                    WHEN EXISTS (SELECT FROM pgflow.step_states s
                                 WHERE s.run_id = r.id AND s.status = 'pending' AND s.started_at IS NOT NULL)
                    THEN 'held' ELSE 'ended' END
        FROM unnest(run_ids, epochs) AS held (run_id, epoch)
        LEFT JOIN pgflow.runs r ON r.id = held.run_id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.extend_leases(uuid[], int[], double precision) IS
    'Extends the leases of runs in the epochs in which they were taken, and tells of each: held; lost, to somebody '
    'else; ended, with no report outstanding.';


CREATE OR REPLACE FUNCTION pgflow_prefect.release_run(run_id uuid, epoch int) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs := pgflow.lock_run(run_id);
BEGIN
    UPDATE pgflow_prefect.owners o SET lease_until = '-infinity'
    WHERE o.run_id = run.id AND o.epoch = release_run.epoch;
    IF FOUND AND run.status = 'pending' AND run.epoch = release_run.epoch THEN
        PERFORM pgflow.announce_run(run); -- for whoever takes it next
        RETURN true;
    END IF;
    RETURN false;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.release_run(uuid, int) IS
    'Hands a run back: its lease ends now. False where there was nothing to hand back.';


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
    INSERT INTO pgflow_prefect.enabled_workflows AS e (workflow_slug, enabled)
    VALUES (enable_workflow.workflow_slug, enable_workflow.enabled)
    ON CONFLICT (workflow_slug) DO UPDATE
    SET enabled = excluded.enabled,
        since = CASE WHEN e.enabled = excluded.enabled THEN e.since ELSE excluded.since END -- twice: no change
    RETURNING e.* INTO row;
    RETURN row;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.enable_workflow(text, boolean) IS
    'From now on, workers and bridges take this workflow''s new runs; false: they take none.';


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
    'Tells whether somebody has taken the run since this epoch, and counts it where that is so.';


CREATE OR REPLACE FUNCTION pgflow_prefect.claim_step(
    run_id uuid, step_slug text, epoch int, task_run_id uuid, upstream text[], with_payload boolean
) RETURNS TABLE (status text, attempt int, step_result jsonb, payload jsonb, upstream_results jsonb)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    IF pgflow_prefect.is_stale(claim_step.run_id, claim_step.epoch) THEN
        RETURN NEXT; -- without a status; an error would take the count back
        RETURN;
    END IF;
    SELECT c.* INTO status, attempt, step_result, payload, upstream_results
    FROM pgflow.claim_step(claim_step.run_id, claim_step.step_slug, claim_step.epoch,
                           claim_step.upstream, claim_step.with_payload) c;
    INSERT INTO pgflow_prefect.task_runs AS t (run_id, step_slug, task_run_id, state_name)
    VALUES (claim_step.run_id, claim_step.step_slug, claim_step.task_run_id,
            CASE status WHEN 'completed' THEN 'Cached' ELSE 'Running' END)
    ON CONFLICT (run_id, step_slug) DO UPDATE
    SET task_run_id = excluded.task_run_id, state_name = excluded.state_name, updated_at = clock_timestamp();
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_step(uuid, text, int, uuid, text[], boolean) IS
    'pgflow.claim_step, and which task run claimed it; all NULL for a former owner.';


CREATE OR REPLACE FUNCTION pgflow_prefect.note_state(
    run_id uuid, step_slug text, task_run_id uuid, state_name text, message text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
BEGIN
    UPDATE pgflow_prefect.task_runs t
    SET state_name = note_state.state_name, message = coalesce(note_state.message, t.message),
        updated_at = clock_timestamp()
    WHERE t.run_id = note_state.run_id AND t.step_slug = note_state.step_slug
      AND t.task_run_id = note_state.task_run_id; -- another flow run's task run has taken the step's place
END
$$;

COMMENT ON FUNCTION pgflow_prefect.note_state(uuid, text, uuid, text, text) IS
    'Notes the state that Prefect shows a step''s task run in, such as AwaitingRetry.';


CREATE OR REPLACE FUNCTION pgflow_prefect.complete_step(
    run_id uuid, step_slug text, step_result jsonb, epoch int, attempt int, task_run_id uuid
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    state pgflow.step_states := pgflow.complete_step(run_id, step_slug, step_result, epoch, attempt);
BEGIN
    PERFORM pgflow_prefect.is_stale(run_id, epoch); -- refused already; counted
    IF state.status = 'completed' THEN
        PERFORM pgflow_prefect.note_state(run_id, step_slug, task_run_id, 'Completed');
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.complete_step(uuid, text, jsonb, int, int, uuid) IS
    'pgflow.complete_step, and the state of the task run.';


CREATE OR REPLACE FUNCTION pgflow_prefect.fail_step(
    run_id uuid, step_slug text, error_message text, epoch int, attempt int, task_run_id uuid, state_name text
) RETURNS pgflow.step_states
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    state pgflow.step_states := pgflow.fail_step(run_id, step_slug, error_message, epoch, attempt);
BEGIN
    PERFORM pgflow_prefect.is_stale(run_id, epoch); -- refused already; counted
    IF state.status = 'failed' THEN
        PERFORM pgflow_prefect.note_state(run_id, step_slug, task_run_id, state_name, error_message);
    END IF;
    RETURN state;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.fail_step(uuid, text, text, int, int, uuid, text) IS
    'pgflow.fail_step, and the state of the task run.';


DO $rights$
DECLARE
    created regprocedure;
BEGIN
    FOR created IN
        SELECT oid FROM pg_catalog.pg_proc
        WHERE pronamespace = 'pgflow_prefect'::regnamespace AND proacl IS NULL AND proname IN (
            'adapter_version', 'is_leased', 'how_held', 'take_run', 'note_flow_run', 'create_run', 'take_runs', 'link_flow_run',
            'extend_leases', 'release_run', 'enable_workflow', 'is_stale', 'claim_step', 'note_state',
            'complete_step', 'fail_step')
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', created);
    END LOOP;
END
$rights$;

COMMIT;
