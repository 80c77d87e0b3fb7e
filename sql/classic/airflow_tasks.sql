-- pgflow_prefect: tasks of Airflow that ask here who does them. The file that `pgflow-prefect airflow policy` prints calls
-- the first three functions, and needs no other right than EXECUTE on them.
--
-- A part of the classic schema. Needs pgflow.sql and classic/pgflow_prefect.sql.
-- psql -d DATABASE -f airflow_tasks.sql; one transaction, safe to run again.

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

-- The workflows about whose steps an Airflow may ask. Only the owner, or a role that defines workflows, says so.
CREATE TABLE IF NOT EXISTS pgflow_prefect.airflow_dags (
    workflow_slug TEXT PRIMARY KEY REFERENCES pgflow.workflows (slug) ON UPDATE CASCADE ON DELETE CASCADE,
    named_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    removed_at TIMESTAMPTZ         -- the tasks of runs that began later do not ask; NULL: all do
);

DO $columns$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                   WHERE attrelid = 'pgflow_prefect.airflow_dags'::regclass AND attname = 'removed_at') THEN
        ALTER TABLE pgflow_prefect.airflow_dags ADD COLUMN removed_at TIMESTAMPTZ;
    END IF;
END
$columns$;

-- The try of Airflow's that has a step. external_claims keeps other workers away from it meanwhile.
CREATE TABLE IF NOT EXISTS pgflow_prefect.airflow_claims (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    attempt INT NOT NULL,          -- of the step; a row of an earlier attempt is history
    try_number INT NOT NULL,       -- Airflow's. A clear and a retry raise it
    claimed_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug)
);

-- Since when a try of Airflow's waits for a step that a worker here does.
CREATE TABLE IF NOT EXISTS pgflow_prefect.airflow_waits (
    run_id UUID NOT NULL REFERENCES pgflow.runs (id) ON DELETE CASCADE,
    step_slug TEXT NOT NULL,
    try_number INT NOT NULL,
    since TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (run_id, step_slug)
);


CREATE OR REPLACE FUNCTION pgflow_prefect.name_airflow_dags(workflow_slugs text[]) RETURNS SETOF text
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
DECLARE
    unknown text;
    moved record;
BEGIN
    SELECT n.slug INTO unknown FROM unnest(workflow_slugs) AS n (slug)
    WHERE NOT EXISTS (SELECT FROM pgflow.workflows w WHERE w.slug = n.slug);
    IF FOUND THEN
        RAISE EXCEPTION 'unknown workflow "%"', coalesce(unknown, 'NULL') USING ERRCODE = 'no_data_found';
    END IF;
    -- A session that binds one of them takes this lock, too: one waits for the other.
    PERFORM FROM pgflow.steps s WHERE s.workflow_slug = ANY (workflow_slugs) AND s.step_type = 'map'
    ORDER BY s.workflow_slug, s.slug FOR NO KEY UPDATE;
    SELECT b.workflow_slug, b.step_slug INTO moved
    FROM pgflow.steps s
    JOIN pgflow_prefect.bindings b ON b.workflow_slug = s.workflow_slug AND b.step_slug = s.slug
    WHERE s.workflow_slug = ANY (workflow_slugs) AND s.step_type = 'map' AND b.kind <> 'external'
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'step "%" of workflow "%" is bound here, and Airflow would execute it as well: mapped tasks do not ask',
                        moved.step_slug, moved.workflow_slug
            USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Bind the step as external first.';
    END IF;
    RETURN QUERY INSERT INTO pgflow_prefect.airflow_dags AS d (workflow_slug)
        SELECT DISTINCT n.slug FROM unnest(workflow_slugs) AS n (slug)
        ON CONFLICT (workflow_slug) DO UPDATE SET removed_at = NULL WHERE d.removed_at IS NOT NULL
        RETURNING d.workflow_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.name_airflow_dags(text[]) IS
    'Lets the tasks of these DAGs of Airflow ask who does them. Returns those that could not before.';


CREATE OR REPLACE FUNCTION pgflow_prefect.remove_airflow_dags(workflow_slugs text[])
RETURNS TABLE (workflow_slug text, moved text[], going_on bigint)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    sees_runs CONSTANT boolean := has_table_privilege('pgflow.runs', 'SELECT')
                                  AND has_table_privilege('pgflow_prefect.airflow_claims', 'SELECT');
BEGIN
    -- A run that has begun meanwhile is older than the removal: the time is taken after the wait for it.
    PERFORM FROM pgflow_prefect.airflow_dags d
    WHERE d.workflow_slug = ANY (remove_airflow_dags.workflow_slugs) ORDER BY d.workflow_slug FOR NO KEY UPDATE;
    FOR workflow_slug, moved IN
        WITH removed AS (
            UPDATE pgflow_prefect.airflow_dags d SET removed_at = clock_timestamp()
            WHERE d.workflow_slug = ANY (remove_airflow_dags.workflow_slugs) AND d.removed_at IS NULL
            RETURNING d.workflow_slug
        )
        SELECT r.workflow_slug, pgflow_prefect.list_moved(r.workflow_slug) FROM removed r ORDER BY r.workflow_slug
    LOOP
        going_on := NULL;
        IF sees_runs THEN
            SELECT count(*) INTO going_on FROM pgflow.runs p
            WHERE p.workflow_slug = remove_airflow_dags.workflow_slug AND p.status = 'pending'
              AND EXISTS (SELECT FROM pgflow_prefect.airflow_claims c WHERE c.run_id = p.id OFFSET 0);
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.remove_airflow_dags(text[]) IS
    'Lets the tasks of these DAGs ask no more, but for those of runs that go on. Returns those that could ask, the steps '
    'that are bound here, and how many of the runs go on; NULL for a role that may not read runs.';


CREATE OR REPLACE FUNCTION pgflow_prefect.may_ask(workflow_slug text, run_id uuid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT EXISTS (
        SELECT FROM pgflow_prefect.airflow_dags d
        WHERE d.workflow_slug = may_ask.workflow_slug
          AND (d.removed_at IS NULL
               OR EXISTS (SELECT FROM pgflow.runs r WHERE r.id = may_ask.run_id
                            AND r.workflow_slug = may_ask.workflow_slug AND r.created_at < d.removed_at)))
$$;

COMMENT ON FUNCTION pgflow_prefect.may_ask(text, uuid) IS
    'True if the tasks of this run of a DAG may ask who does them: a run goes on as it began. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_mirrors(run_id uuid) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT EXISTS (SELECT FROM pgflow_prefect.mirrored_runs m WHERE m.run_id = is_mirrors.run_id AND NOT m.executed_here)
$$;

COMMENT ON FUNCTION pgflow_prefect.is_mirrors(uuid) IS
    'True for a run that a mirror of Airflow has begun and moves to its end: no worker here takes it. Internal.';


------------------------------------------------------------------------------------------------------------
-- Who does a task
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.judge_airflow_task(run pgflow.runs, step_slug text, try_number int) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    step pgflow.definition_steps;
    state pgflow.step_states;
    task pgflow_prefect.task_runs;
    claim pgflow_prefect.airflow_claims;
    is_ours boolean; -- a row has moved the step, or a run of another workflow is executed for it
    has_begun boolean; -- a worker of this product has claimed the attempt under way
BEGIN
    SELECT * INTO step FROM pgflow.definition_steps d WHERE d.definition_id = run.definition_id AND d.slug = step_slug;
    IF NOT FOUND OR step.step_type = 'map' THEN
        RETURN 'unknown'; -- Airflow's mapped tasks do not ask
    END IF;
    is_ours := step.child_workflow IS NOT NULL OR coalesce((SELECT b.kind <> 'external' FROM pgflow_prefect.bindings b
                                                            WHERE b.workflow_slug = run.workflow_slug
                                                              AND b.step_slug = judge_airflow_task.step_slug), false);
    SELECT * INTO state FROM pgflow.step_states s
    WHERE s.run_id = run.id AND s.step_slug = judge_airflow_task.step_slug;
    SELECT * INTO task FROM pgflow_prefect.task_runs t
    WHERE t.run_id = run.id AND t.step_slug = judge_airflow_task.step_slug AND t.task_index = 0;
    SELECT * INTO claim FROM pgflow_prefect.airflow_claims c
    WHERE c.run_id = run.id AND c.step_slug = judge_airflow_task.step_slug AND c.attempt = state.attempts;
    IF claim.try_number > judge_airflow_task.try_number THEN
        RETURN 'stale'; -- Airflow has given this try up, and has begun another one
    END IF;
    -- What a mirror wrote is Airflow's: no worker here has begun it, and none takes such a run.
    has_begun := coalesce(state.started_at IS NOT NULL AND task.attempt = state.attempts, false) AND claim.run_id IS NULL
                 AND task.handler IS DISTINCT FROM 'airflow';
    IF claim.run_id IS NULL AND NOT has_begun AND coalesce(task.handler, 'airflow') = 'airflow'
       AND pgflow_prefect.is_mirrors(run.id) THEN
        RETURN 'mirrored';
    END IF;
    IF state.status = 'completed' OR state.status = 'failed' THEN
        -- What Airflow has done, and what it skipped or a mirror of it reported without a claim, Airflow may do again.
        IF NOT is_ours AND (claim.run_id IS NOT NULL OR state.attempts = 0) THEN
            RETURN 'again';
        END IF;
        RETURN CASE WHEN state.status = 'failed' THEN 'failed' WHEN state.skip_reason IS NOT NULL THEN 'skipped'
                    ELSE 'completed' END;
    ELSIF run.status <> 'pending' THEN
        RETURN CASE WHEN is_ours OR has_begun THEN 'failed' ELSE 'again' END;
    ELSIF claim.try_number = judge_airflow_task.try_number
          AND pgflow_prefect.is_claimed_outside(state, 0) THEN
        RETURN 'held'; -- the same try once more: its answer was lost, or a sensor looks again
    ELSIF has_begun OR is_ours THEN
        RETURN 'wait';
    ELSIF claim.run_id IS NULL AND state.run_id IS NOT NULL AND pgflow_prefect.is_claimed_outside(state, 0) THEN
        RETURN 'wait'; -- another external worker has it
    END IF;
    RETURN 'free';
END
$$;

COMMENT ON FUNCTION pgflow_prefect.judge_airflow_task(pgflow.runs, text, int) IS
    'Who does a step at this moment, for a try of Airflow''s: held, free or again: Airflow. wait: a worker here. completed, '
    'skipped, failed: it has ended here. stale: a later try of Airflow''s has it. unknown: no step, or a map. mirrored: '
    'Airflow, and a mirror reports it. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.begin_airflow_run(
    workflow_slug text, run_id uuid, payload jsonb, logical_date timestamptz, interval_start timestamptz,
    interval_end timestamptz
) RETURNS pgflow.runs
LANGUAGE plpgsql VOLATILE
AS $$
DECLARE
    wanted pgflow.runs;
BEGIN
    wanted.workflow_slug := workflow_slug;
    wanted.id := run_id;
    wanted.payload := payload;
    wanted.logical_date := logical_date;
    wanted.data_interval := CASE WHEN interval_start OPERATOR(pg_catalog.<) interval_end
                                 THEN pg_catalog.tstzrange(interval_start, interval_end) END;
    RETURN pgflow.begin_run(wanted);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.begin_airflow_run(text, uuid, jsonb, timestamptz, timestamptz, timestamptz) IS
    'Starts the run of a run of Airflow. The same id again returns the run that exists. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_for_airflow(run pgflow.runs, step_slug text, try_number int) RETURNS void
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    claimed pg_catalog.record;
BEGIN
    -- Airflow may begin a task before a mirror has reported the ends above it: the step starts now, as one by hand.
    INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
    VALUES (run.workflow_slug, run.id, take_for_airflow.step_slug)
    ON CONFLICT (run_id, step_slug) DO NOTHING;
    SELECT * INTO claimed FROM pgflow.claim_step(run.id, take_for_airflow.step_slug, NULL, '{}', false);
    INSERT INTO pgflow_prefect.external_claims AS c (run_id, step_slug, task_index, attempt, claimed_until)
    VALUES (run.id, take_for_airflow.step_slug, 0, claimed.attempt, 'infinity')
    ON CONFLICT (run_id, step_slug, task_index) DO UPDATE
    SET attempt = excluded.attempt, claimed_until = excluded.claimed_until, claimed_by = excluded.claimed_by,
        holder = NULL, failure = NULL, is_final = NULL;
    INSERT INTO pgflow_prefect.airflow_claims AS c (run_id, step_slug, attempt, try_number)
    VALUES (run.id, take_for_airflow.step_slug, claimed.attempt, take_for_airflow.try_number)
    ON CONFLICT (run_id, step_slug) DO UPDATE
    SET attempt = excluded.attempt, try_number = excluded.try_number, claimed_at = excluded.claimed_at;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_for_airflow(pgflow.runs, text, int) IS
    'Claims a pending step of a locked run for a try of Airflow''s, until that is reported or another try asks. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.let_airflow_wait(run pgflow.runs, step_slug text, try_number int)
RETURNS double precision
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
#variable_conflict use_column
DECLARE
    waits_since timestamptz;
BEGIN
    -- The row stays: a late question of the former try finds that there is a later one.
    UPDATE pgflow_prefect.external_claims e SET claimed_until = clock_timestamp()
    FROM pgflow_prefect.airflow_claims c
    WHERE c.run_id = run.id AND c.step_slug = let_airflow_wait.step_slug
      AND c.try_number < let_airflow_wait.try_number
      AND e.run_id = c.run_id AND e.step_slug = c.step_slug AND e.task_index = 0 AND e.attempt = c.attempt
      AND e.claimed_until > clock_timestamp();
    UPDATE pgflow_prefect.airflow_claims c SET try_number = let_airflow_wait.try_number
    WHERE c.run_id = run.id AND c.step_slug = let_airflow_wait.step_slug
      AND c.try_number < let_airflow_wait.try_number;
    INSERT INTO pgflow_prefect.airflow_waits AS w (run_id, step_slug, try_number)
    VALUES (run.id, let_airflow_wait.step_slug, let_airflow_wait.try_number)
    ON CONFLICT (run_id, step_slug) DO UPDATE
    SET since = CASE WHEN w.try_number = excluded.try_number THEN w.since ELSE excluded.since END,
        try_number = excluded.try_number
    RETURNING w.since INTO waits_since;
    RETURN extract(epoch FROM clock_timestamp() - waits_since);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.let_airflow_wait(pgflow.runs, text, int) IS
    'Ends the claim that an earlier try of Airflow''s left behind, so that a worker here can begin the step. Returns for how '
    'many seconds this try waits already. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_taken(run pgflow.runs, step_slug text) RETURNS text[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT CASE WHEN bool_or(s.skip_reason = 'branch_not_taken' AND s.skipped_by = list_taken.step_slug)
                THEN coalesce(array_agg(d.to_step_slug ORDER BY d.to_step_slug) FILTER (
                    WHERE (s.skip_reason = 'branch_not_taken' AND s.skipped_by = list_taken.step_slug) IS NOT TRUE), '{}') END
    FROM pgflow.definition_deps d
    LEFT JOIN pgflow.step_states s ON s.run_id = run.id AND s.step_slug = d.to_step_slug
    WHERE d.definition_id = run.definition_id AND d.from_step_slug = list_taken.step_slug
$$;

COMMENT ON FUNCTION pgflow_prefect.list_taken(pgflow.runs, text) IS
    'The branches that a completed step took; NULL where it left none out. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_moved(workflow_slug text) RETURNS text[]
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT coalesce(array_agg(m.step_slug ORDER BY m.step_slug), '{}')
    FROM (SELECT b.step_slug FROM pgflow_prefect.bindings b
          WHERE b.workflow_slug = list_moved.workflow_slug AND b.kind <> 'external'
          UNION
          SELECT s.slug FROM pgflow.steps s
          WHERE s.workflow_slug = list_moved.workflow_slug AND s.child_workflow IS NOT NULL
            AND s.step_type <> 'map') m -- as judge_airflow_task
$$;

COMMENT ON FUNCTION pgflow_prefect.list_moved(text) IS
    'The steps of a workflow that a row has moved here from an external worker, or that are runs of other workflows. Internal.';


------------------------------------------------------------------------------------------------------------
-- What Airflow calls. Each has the owner's rights, so that Airflow's role needs no right on any table. They set search_path
-- although they write runs and step_states: your triggers run inside them with the owner's rights, and the caller's
-- search_path must not decide what unqualified names mean.
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.claim_airflow_task(
    dag_id text, task_id text, try_number int, run_id uuid, payload jsonb, logical_date timestamptz,
    interval_start timestamptz, interval_end timestamptz
) RETURNS TABLE (answer text, result text, message text, taken text[], moved text[], waited double precision)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    state pgflow.step_states;
    verdict text;
BEGIN
    moved := '{}';
    IF NOT pgflow_prefect.may_ask(dag_id, claim_airflow_task.run_id) THEN
        answer := 'unknown';
        RETURN NEXT;
        RETURN;
    ELSIF try_number IS NULL OR claim_airflow_task.run_id IS NULL THEN
        RAISE EXCEPTION 'which try of which run? give try_number and run_id' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF NOT EXISTS (SELECT FROM pgflow.runs r WHERE r.id = claim_airflow_task.run_id) THEN
        -- A run that begins while the DAG is being removed comes before that, or waits for it and does not begin.
        PERFORM FROM pgflow_prefect.airflow_dags d WHERE d.workflow_slug = dag_id AND d.removed_at IS NULL FOR SHARE;
        IF NOT FOUND THEN
            answer := 'unknown';
            RETURN NEXT;
            RETURN;
        END IF;
    END IF;
    moved := pgflow_prefect.list_moved(dag_id);
    run := pgflow_prefect.begin_airflow_run(dag_id, claim_airflow_task.run_id, payload, logical_date, interval_start,
                                            interval_end);
    run := pgflow.lock_run(run.id); -- every other claim of the step comes before this one, or waits for it
    verdict := pgflow_prefect.judge_airflow_task(run, task_id, claim_airflow_task.try_number);
    IF verdict = 'free' THEN
        PERFORM pgflow_prefect.take_for_airflow(run, task_id, claim_airflow_task.try_number);
    ELSIF verdict = 'wait' THEN
        waited := pgflow_prefect.let_airflow_wait(run, task_id, claim_airflow_task.try_number);
    ELSIF verdict IN ('completed', 'skipped', 'failed') THEN
        SELECT * INTO state FROM pgflow.step_states s WHERE s.run_id = run.id AND s.step_slug = task_id;
        IF verdict = 'completed' THEN
            result := pgflow.check_json(state.step_result, false, format('the result of step "%s"', task_id))::text;
            taken := pgflow_prefect.list_taken(run, task_id);
        ELSE
            message := CASE WHEN verdict = 'skipped' THEN pgflow_prefect.describe_skip(state)
                            ELSE coalesce(state.error_message, run.error_message, format('the run is %s', run.status)) END;
        END IF;
    END IF;
    answer := CASE WHEN verdict IN ('held', 'free', 'again', 'mirrored') THEN 'airflow' ELSE verdict END;
    RETURN NEXT;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.claim_airflow_task(
    text, text, int, uuid, jsonb, timestamptz, timestamptz, timestamptz) IS
    'For a task of Airflow that is about to execute: airflow: it has claimed the step. wait: a worker here does it. '
    'completed, skipped, failed: it has ended here, with this result as JSON or this message. unknown: not a step here. '
    'stale: a later try has it. Starts the run where there is none yet.';


CREATE OR REPLACE FUNCTION pgflow_prefect.watch_airflow_tasks(run_ids uuid[], task_ids text[], try_numbers int[])
RETURNS SETOF int
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp SET row_security = off
AS $$
DECLARE
    waiting record;
    run pgflow.runs;
BEGIN
    FOR waiting IN
        SELECT w.run_id, w.task_id, w.try_number, w.place::int AS place
        FROM unnest(run_ids, task_ids, try_numbers) WITH ORDINALITY AS w (run_id, task_id, try_number, place)
    LOOP
        SELECT * INTO run FROM pgflow.runs r WHERE r.id = waiting.run_id;
        CONTINUE WHEN FOUND AND pgflow_prefect.judge_airflow_task(run, waiting.task_id, waiting.try_number) = 'wait'
            AND pgflow_prefect.may_ask(run.workflow_slug, run.id);
        RETURN NEXT waiting.place;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.watch_airflow_tasks(uuid[], text[], int[]) IS
    'Those of these waiting tasks of Airflow, by their places from 1 on, that no worker here does any more: they ask again.';


CREATE OR REPLACE FUNCTION pgflow_prefect.end_airflow_task(
    run_id uuid, task_id text, try_number int, outcome text, result jsonb, message text, taken text[], whole boolean
) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    run pgflow.runs;
    verdict text;
    ended pgflow.step_states;
BEGIN
    IF (outcome IN ('completed', 'skipped', 'failed', 'gave-up')) IS NOT TRUE THEN
        RAISE EXCEPTION 'a task of Airflow can''t end as "%"', coalesce(outcome, 'NULL')
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Say completed, skipped, failed or gave-up.';
    ELSIF NOT EXISTS (SELECT FROM pgflow.runs r
                      WHERE r.id = end_airflow_task.run_id AND pgflow_prefect.may_ask(r.workflow_slug, r.id)) THEN
        RETURN false;
    END IF;
    run := pgflow.lock_run(end_airflow_task.run_id);
    verdict := pgflow_prefect.judge_airflow_task(run, task_id, end_airflow_task.try_number);
    IF outcome = 'gave-up' AND verdict = 'wait' THEN
        IF EXISTS (SELECT FROM pgflow.step_states s
                   WHERE s.run_id = run.id AND s.step_slug = task_id AND s.started_at IS NOT NULL) THEN
            RETURN false; -- a worker has begun it: what comes of it counts
        END IF;
        INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
        VALUES (run.workflow_slug, run.id, task_id)
        ON CONFLICT (run_id, step_slug) DO NOTHING; -- as in take_for_airflow
    ELSIF outcome = 'gave-up' OR verdict NOT IN ('held', 'free') THEN
        RETURN false; -- the first report counts, and no other than that of the try that has the step
    ELSIF verdict = 'free' THEN -- Airflow could not ask before it began
        PERFORM pgflow_prefect.take_for_airflow(run, task_id, end_airflow_task.try_number);
    END IF;
    CASE
        WHEN outcome = 'completed' AND taken IS NOT NULL THEN
            SELECT * INTO ended FROM pgflow.take_branches(run.id, task_id, taken, coalesce(result, 'null'), whole);
        WHEN outcome = 'completed' THEN
            SELECT * INTO ended FROM pgflow.complete_step(run.id, task_id, coalesce(result, 'null'));
        WHEN outcome = 'skipped' THEN
            SELECT * INTO ended FROM pgflow.skip_step(run.id, task_id, left(message, 10000));
        ELSE
            SELECT * INTO ended FROM pgflow.fail_step(run.id, task_id, left(message, 10000));
    END CASE;
    RETURN ended.status <> 'pending';
END
$$;

COMMENT ON FUNCTION pgflow_prefect.end_airflow_task(uuid, text, int, text, jsonb, text, text[], boolean) IS
    'For a task of Airflow that has ended: completed, with its result and the branches that it took, or NULL; skipped or '
    'failed for good, with a message; gave-up: it no longer waits for a step, which fails unless a worker here has begun '
    'it. False where that changes nothing.';


------------------------------------------------------------------------------------------------------------
-- Tasks that the policy does not see: a mirror of Airflow reports their ends
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.list_asking_runs(workflow_slugs text[], after uuid, at_most int)
RETURNS TABLE (run_id uuid, workflow_slug text, source_run_id text, steps jsonb)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT p.id, p.workflow_slug, p.payload ->> 'airflow_run_id',
               (SELECT jsonb_object_agg(d.slug, c.run_id IS NOT NULL)
                FROM pgflow.definition_steps d
                LEFT JOIN pgflow.step_states s ON s.run_id = p.id AND s.step_slug = d.slug
                LEFT JOIN pgflow_prefect.airflow_claims c
                    ON c.run_id = p.id AND c.step_slug = d.slug AND c.attempt = s.attempts
                WHERE d.definition_id = p.definition_id AND coalesce(s.status, 'pending') = 'pending'
                  AND d.slug <> ALL (p.moved))
        FROM (SELECT r.*, pgflow_prefect.list_moved(r.workflow_slug) AS moved FROM pgflow.runs r
              WHERE r.status = 'pending' AND r.workflow_slug = ANY (list_asking_runs.workflow_slugs)
                AND (list_asking_runs.after IS NULL OR r.id > list_asking_runs.after)
                AND EXISTS (SELECT FROM pgflow_prefect.airflow_dags d WHERE d.workflow_slug = r.workflow_slug)
                AND jsonb_typeof(r.payload -> 'airflow_run_id') = 'string'
                AND NOT pgflow_prefect.is_mirrors(r.id)
              ORDER BY r.id LIMIT list_asking_runs.at_most) p
        ORDER BY p.id;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_asking_runs(text[], uuid, int) IS
    'Pending runs of Airflow whose tasks ask here, behind an id; their steps that Airflow does and that have not ended here: '
    'true for one that has asked.';


CREATE OR REPLACE FUNCTION pgflow_prefect.end_unseen_airflow_task(
    run_id uuid, task_id text, try_number int, outcome text, result jsonb, message text
) RETURNS boolean
LANGUAGE plpgsql VOLATILE
AS $$
#variable_conflict use_column
DECLARE
    run CONSTANT pgflow.runs := pgflow.lock_run(run_id);
    verdict CONSTANT pg_catalog.text := pgflow_prefect.judge_airflow_task(run, task_id, end_unseen_airflow_task.try_number);
    ended pgflow.step_states;
BEGIN
    IF verdict OPERATOR(pg_catalog.=) 'free' THEN
        PERFORM pgflow_prefect.take_for_airflow(run, task_id, end_unseen_airflow_task.try_number);
    ELSIF verdict OPERATOR(pg_catalog.=) 'unknown' AND run.status OPERATOR(pg_catalog.=) 'pending'
          AND pgflow_prefect.is_map_of_airflows(run, task_id) THEN
        INSERT INTO pgflow.step_states (workflow_slug, run_id, step_slug)
        VALUES (run.workflow_slug, run.id, task_id)
        ON CONFLICT (run_id, step_slug) DO NOTHING; -- as in take_for_airflow
    ELSIF verdict OPERATOR(pg_catalog.<>) 'held' THEN
        RETURN false; -- a worker here has it, or it has ended
    END IF;
    IF outcome OPERATOR(pg_catalog.=) 'completed' THEN
        SELECT * INTO ended FROM pgflow.complete_step(run.id, task_id, coalesce(result, 'null'));
    ELSIF outcome OPERATOR(pg_catalog.=) 'skipped' THEN
        SELECT * INTO ended FROM pgflow.skip_step(run.id, task_id, message);
    ELSE
        SELECT * INTO ended FROM pgflow.fail_step(run.id, task_id, message);
    END IF;
    RETURN ended.status OPERATOR(pg_catalog.<>) 'pending';
END
$$;

COMMENT ON FUNCTION pgflow_prefect.end_unseen_airflow_task(uuid, text, int, text, jsonb, text) IS
    'Reports how a task of Airflow has ended that has not reported itself: completed, skipped or failed. False where that '
    'changes nothing.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_map_of_airflows(run pgflow.runs, step_slug text) RETURNS boolean
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off
AS $$
    SELECT EXISTS (SELECT FROM pgflow.definition_steps d
                   WHERE d.definition_id = run.definition_id AND d.slug = is_map_of_airflows.step_slug
                     AND d.step_type = 'map' AND d.child_workflow IS NULL)
       AND NOT EXISTS (SELECT FROM pgflow_prefect.bindings b
                       WHERE b.workflow_slug = run.workflow_slug AND b.step_slug = is_map_of_airflows.step_slug
                         AND b.kind <> 'external')
$$;

COMMENT ON FUNCTION pgflow_prefect.is_map_of_airflows(pgflow.runs, text) IS
    'True for a map whose tasks Airflow executes. Internal.';


DO $rights$
BEGIN
    PERFORM pgflow.close_schema('pgflow_prefect');
END
$rights$;

COMMIT;
