-- pgflow_prefect on the released pgflow (pgflow.dev): single steps that Prefect executes beside pgflow's own workers.
--
-- A part of the contract of ../CONTRACT.md; needs moving.sql. All steps of a flow share a queue, so a worker of pgflow's would
-- read the messages of a moved step, too. These messages wait in the table taken_out instead. A trigger puts one back into
-- the queue in the transaction in which its task ends or fails, where pgflow's functions expect it. The triggers on
-- pgflow.step_tasks exist while a step is moved. Each message can be rebuilt from pgflow.step_tasks.
--
-- Locks: first the table pgflow.step_tasks, which is locked whole where triggers are created or dropped; then the row of
-- moved_steps; then the step's rows in taken_out. So a report never waits for a function that waits for the report.
-- psql -d DATABASE -f pgflow_prefect.sql -f moving.sql -f steps.sql -f executing.sql -f bindings.sql -f observing.sql; safe to
-- run again.

BEGIN ISOLATION LEVEL READ COMMITTED; -- an older snapshot would not show what another session has just installed

SET LOCAL lock_timeout = '10s';
SET LOCAL statement_timeout = 0;
SET LOCAL client_min_messages = warning;

DO $guard$
BEGIN
    IF to_regclass('pgflow_prefect.moved_steps') IS NULL THEN
        RAISE EXCEPTION 'the tables of pgflow_prefect for the released pgflow are missing'
            USING HINT = 'Run pgflow_prefect.sql and moving.sql first.';
    END IF;
    PERFORM set_config('transaction_timeout', '0', true)
    WHERE current_setting('transaction_timeout', true) <> '0'; -- PostgreSQL 17 has it
    -- This locks the schema itself: two installations at once take turns.
    COMMENT ON SCHEMA pgflow_prefect IS 'What pgflow-prefect reads and executes of the released pgflow.';
END
$guard$;


------------------------------------------------------------------------------------------------------------
-- Messages
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_queue(flow_slug text) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    queue text := pgmq.format_table_name(flow_slug, 'q');
BEGIN
    RETURN CASE WHEN to_regclass(format('pgmq.%I', queue)) IS NOT NULL THEN queue END;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_queue(text) IS
    'The table of a flow''s queue, in the schema pgmq; NULL: there is none. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_out(flow_slug text, message_ids bigint[]) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    queue text := pgflow_prefect.find_queue(flow_slug);
    taken int := 0;
BEGIN
    IF queue IS NULL OR message_ids IS NULL THEN
        RETURN 0;
    END IF;
    -- A message that a worker has read, and not begun yet, stays that worker's until it is visible: so vt is kept.
    -- delete_flow_and_data begins with the first id again, so that an old row is overwritten whole.
    EXECUTE format($query$
        WITH gone AS (
            DELETE FROM pgmq.%1$I q USING pgflow.step_tasks t
            WHERE q.msg_id = ANY ($2) AND t.flow_slug = $1 AND t.message_id = q.msg_id AND t.status IN ('queued', 'started')
            RETURNING q.msg_id, q.vt, to_jsonb(q) AS message, t.run_id, t.step_slug, t.task_index)
        INSERT INTO pgflow_prefect.taken_out AS o (flow_slug, message_id, run_id, step_slug, task_index, due_at, message)
        SELECT $1, g.msg_id, g.run_id, g.step_slug, g.task_index, g.vt, g.message FROM gone g
        ON CONFLICT (flow_slug, message_id) DO UPDATE
        SET run_id = excluded.run_id, step_slug = excluded.step_slug, task_index = excluded.task_index,
            due_at = excluded.due_at, message = excluded.message
        $query$, queue) USING flow_slug, message_ids;
    GET DIAGNOSTICS taken = ROW_COUNT;
    RETURN taken;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_out(text, bigint[]) IS
    'Moves messages of a flow out of its queue into taken_out, and returns how many. The caller holds the row of their step '
    'in moved_steps. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.put_in(flow_slug text, messages jsonb[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    queue text := pgflow_prefect.find_queue(flow_slug);
BEGIN
    IF queue IS NOT NULL AND messages IS NOT NULL THEN
        EXECUTE format($query$
            INSERT INTO pgmq.%1$I OVERRIDING SYSTEM VALUE
            SELECT r.* FROM unnest($1) AS m (message), jsonb_populate_record(NULL::pgmq.%1$I, m.message) r
            ON CONFLICT DO NOTHING
            $query$, queue) USING messages;
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.put_in(text, jsonb[]) IS
    'Puts messages, as rows of the queue, into a flow''s queue. One that is there stays. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.is_awaited(message pgflow_prefect.taken_out) RETURNS text
LANGUAGE sql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
    SELECT CASE WHEN t.status IN ('queued', 'started') AND r.status = 'started' AND s.status = 'started' THEN t.status
                ELSE 'ended' END
    FROM pgflow.step_tasks t
    JOIN pgflow.runs r ON r.run_id = t.run_id
    JOIN pgflow.step_states s ON s.run_id = t.run_id AND s.step_slug = t.step_slug
    WHERE t.run_id = message.run_id AND t.step_slug = message.step_slug AND t.task_index = message.task_index
      AND t.message_id = message.message_id
$$;

COMMENT ON FUNCTION pgflow_prefect.is_awaited(pgflow_prefect.taken_out) IS
    'How the task of a message stands: queued, started, or ended, also by the end of its run or step; NULL: it was deleted. '
    'Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.put_back(flow_slug text, messages pgflow_prefect.taken_out[]) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    back jsonb[];
    ended bigint[];
BEGIN
    SELECT array_agg(m.message || jsonb_build_object('vt', CASE m.stands
               WHEN 'started' THEN (SELECT t.started_at + make_interval(secs => coalesce(s.opt_timeout, f.opt_timeout) + 2)
                                    FROM pgflow.step_tasks t
                                    JOIN pgflow.steps s ON s.flow_slug = t.flow_slug AND s.step_slug = t.step_slug
                                    JOIN pgflow.flows f ON f.flow_slug = t.flow_slug
                                    WHERE t.run_id = m.run_id AND t.step_slug = m.step_slug AND t.task_index = m.task_index)
               ELSE m.due_at END) ORDER BY m.message_id),
           array_agg(m.message_id ORDER BY m.message_id) FILTER (WHERE m.stands = 'ended')
    INTO back, ended
    FROM (SELECT o.*, pgflow_prefect.is_awaited(o) AS stands FROM unnest(put_back.messages) o OFFSET 0) m
    WHERE m.stands IS NOT NULL;
    PERFORM pgflow_prefect.put_in(put_back.flow_slug, back);
    IF ended IS NOT NULL AND pgflow_prefect.find_queue(put_back.flow_slug) IS NOT NULL THEN
        PERFORM FROM pgmq.archive(put_back.flow_slug, ended); -- pgflow did so, and found nothing
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.put_back(text, pgflow_prefect.taken_out[]) IS
    'Puts messages that were taken out back as pgflow would have them: those of queued tasks due when they were, those of begun '
    'ones when their time is over, those of ended ones in the archive. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.end_messages(flow_slug text, only_run uuid DEFAULT NULL) RETURNS int
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    over pgflow_prefect.taken_out[];
BEGIN
    LOCK TABLE pgflow.step_tasks IN ACCESS SHARE MODE; -- before the rows: see the head of this file
    PERFORM FROM pgflow_prefect.moved_steps m WHERE m.flow_slug = end_messages.flow_slug
    ORDER BY m.step_slug FOR KEY SHARE;
    WITH gone AS (
        DELETE FROM pgflow_prefect.taken_out o
        WHERE o.flow_slug = end_messages.flow_slug AND (only_run IS NULL OR o.run_id = only_run)
          AND pgflow_prefect.is_awaited(o) IS DISTINCT FROM 'queued' AND pgflow_prefect.is_awaited(o) IS DISTINCT FROM 'started'
        RETURNING o.*)
    SELECT array_agg(g::pgflow_prefect.taken_out) INTO over FROM gone g;
    PERFORM pgflow_prefect.put_back(end_messages.flow_slug, over);
    RETURN coalesce(cardinality(over), 0);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.end_messages(text, uuid) IS
    'Archives the messages of a flow, or of one of its runs, that were taken out and whose tasks have ended, and returns how '
    'many. Internal.';


------------------------------------------------------------------------------------------------------------
-- Triggers on pgflow.step_tasks
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.take_new_tasks() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER -- the workers of pgflow have no right on our tables
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    fresh record;
BEGIN
    FOR fresh IN
        SELECT n.flow_slug, n.step_slug, array_agg(n.message_id ORDER BY n.message_id) AS message_ids
        FROM new_tasks n
        JOIN pgflow_prefect.moved_steps m ON m.flow_slug = n.flow_slug AND m.step_slug = n.step_slug
        WHERE n.status = 'queued' AND n.message_id IS NOT NULL
        GROUP BY n.flow_slug, n.step_slug ORDER BY n.flow_slug, n.step_slug
    LOOP
        -- A function that moves the step back waits for this lock, and puts these messages back afterwards.
        PERFORM FROM pgflow_prefect.moved_steps m
        WHERE m.flow_slug = fresh.flow_slug AND m.step_slug = fresh.step_slug FOR KEY SHARE;
        IF FOUND THEN
            PERFORM pgflow_prefect.take_out(fresh.flow_slug, fresh.message_ids);
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_new_tasks() IS
    'Takes the messages of new tasks of moved steps out of their queue, in the statement that makes them. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.return_message() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER -- as take_new_tasks
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    held pgflow_prefect.taken_out;
BEGIN
    PERFORM FROM pgflow_prefect.taken_out o
    WHERE o.flow_slug = OLD.flow_slug AND o.message_id = OLD.message_id AND o.run_id = OLD.run_id
      AND o.step_slug = OLD.step_slug AND o.task_index = OLD.task_index;
    IF FOUND THEN
        PERFORM FROM pgflow_prefect.moved_steps m
        WHERE m.flow_slug = OLD.flow_slug AND m.step_slug = OLD.step_slug FOR KEY SHARE;
        DELETE FROM pgflow_prefect.taken_out o WHERE o.flow_slug = OLD.flow_slug AND o.message_id = OLD.message_id
        RETURNING o.* INTO held;
        IF FOUND THEN -- pgflow archives it, or says when it is due
            PERFORM pgflow_prefect.put_in(
                held.flow_slug, ARRAY[held.message || jsonb_build_object('vt', clock_timestamp())]);
        END IF;
    END IF;
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.return_message() IS
    'Puts the message of a task back into its queue in the statement in which the task ends or is to be tried again: pgflow''s '
    'functions go on with it. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.take_again() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER -- as take_new_tasks
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    IF NEW.status <> 'queued' THEN
        -- pgflow archives the messages of a run or a step that has ended with it, as far as they are in the queue.
        IF EXISTS (SELECT FROM pgflow_prefect.taken_out o WHERE o.run_id = NEW.run_id)
           AND (NEW.status = 'failed'
                OR EXISTS (SELECT FROM pgflow.runs r WHERE r.run_id = NEW.run_id AND r.status <> 'started')) THEN
            PERFORM pgflow_prefect.end_messages(NEW.flow_slug, NEW.run_id);
        END IF;
        RETURN NULL;
    END IF;
    PERFORM FROM pgflow_prefect.moved_steps m
    WHERE m.flow_slug = NEW.flow_slug AND m.step_slug = NEW.step_slug FOR KEY SHARE;
    IF FOUND AND EXISTS (SELECT FROM pgflow.step_tasks t
                         WHERE t.run_id = NEW.run_id AND t.step_slug = NEW.step_slug AND t.task_index = NEW.task_index
                           AND t.status = 'queued') THEN
        PERFORM pgflow_prefect.take_out(NEW.flow_slug, ARRAY[NEW.message_id]);
    END IF;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.take_again() IS
    'At the commit: takes the message of a task that waits again out of its queue, for pgflow sets its due time after the task; '
    'and archives what a run or a step has left behind. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.guard_steps(wanted boolean) RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    IF wanted = pgflow_prefect.has_step_triggers() THEN
        RETURN;
    END IF;
    DROP TRIGGER IF EXISTS pgflow_prefect_take_new ON pgflow.step_tasks;
    DROP TRIGGER IF EXISTS pgflow_prefect_return ON pgflow.step_tasks;
    DROP TRIGGER IF EXISTS pgflow_prefect_take_again ON pgflow.step_tasks;
    IF NOT wanted THEN
        RETURN;
    END IF;
    CREATE TRIGGER pgflow_prefect_take_new AFTER INSERT ON pgflow.step_tasks
        REFERENCING NEW TABLE AS new_tasks FOR EACH STATEMENT EXECUTE FUNCTION pgflow_prefect.take_new_tasks();
    -- After pgflow_prefect_keep_claimed, by its name: what that keeps from being put back does not come here.
    CREATE TRIGGER pgflow_prefect_return BEFORE UPDATE OF status ON pgflow.step_tasks
        FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status AND NEW.status <> 'started')
        EXECUTE FUNCTION pgflow_prefect.return_message();
    CREATE CONSTRAINT TRIGGER pgflow_prefect_take_again AFTER UPDATE OF status ON pgflow.step_tasks
        DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status AND NEW.status <> 'started')
        EXECUTE FUNCTION pgflow_prefect.take_again();
END
$$;

COMMENT ON FUNCTION pgflow_prefect.guard_steps(boolean) IS
    'Creates or drops the triggers that keep the messages of moved steps out of their queues. Internal.';


------------------------------------------------------------------------------------------------------------
-- Moving a step
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.refuse_step_queues(flow_slug text) RETURNS void
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
DECLARE
    has_own boolean;
BEGIN
    EXECUTE format($query$
        SELECT EXISTS (SELECT FROM pgflow.flows f WHERE f.flow_slug = $1 AND %s::text = 'step')
            OR EXISTS (SELECT FROM pgflow.steps s WHERE s.flow_slug = $1 AND %s::text <> $1)
        $query$,
        pgflow_prefect.find_column('flows', 'queue_mode', 'f', 'text'),
        pgflow_prefect.find_column('steps', 'queue_name', 's', 'text')) INTO has_own USING flow_slug;
    IF has_own THEN
        RAISE EXCEPTION 'flow "%" stays with pgflow''s own workers: its steps have queues of their own, and this program '
                        'can''t use them yet', flow_slug
            USING ERRCODE = 'feature_not_supported', HINT = 'Compile the flow with one queue, and move it then.';
    ELSIF to_regprocedure('pgflow.start_tasks(text,bigint[],uuid)') IS NULL THEN
        RAISE EXCEPTION 'flow "%" stays with pgflow''s own workers: this program does not know this version of pgflow.start_tasks',
                        flow_slug
            USING ERRCODE = 'feature_not_supported',
                  HINT = 'Upgrade this program: pip install --upgrade pgflow-prefect';
    END IF;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.refuse_step_queues(text) IS
    'Raises 0A000 for a flow whose steps have queues of their own, and for a version that begins tasks in another way. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.does_step(flow pgflow_prefect.moved_flows, step_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    IF flow.is_ours AND flow.by_steps THEN
        LOCK TABLE pgflow.step_tasks IN ACCESS SHARE MODE; -- before the row: see the head of this file
        -- Until this transaction ends, no other one moves the step back.
        PERFORM FROM pgflow_prefect.moved_steps m
        WHERE m.flow_slug = flow.flow_slug AND m.step_slug = does_step.step_slug FOR KEY SHARE;
        RETURN FOUND;
    END IF;
    RETURN coalesce(flow.is_ours, false);
END
$$;

COMMENT ON FUNCTION pgflow_prefect.does_step(pgflow_prefect.moved_flows, text) IS
    'Whether Prefect executes this step: its flow was moved, or the step alone. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.lock_moves() RETURNS void
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
BEGIN
    -- No lock of a table: a worker that looks at moved steps at this moment must not wait.
    PERFORM pg_advisory_xact_lock(hashtextextended('pgflow_prefect.moved_steps', 0));
END
$$;

COMMENT ON FUNCTION pgflow_prefect.lock_moves() IS
    'Lets sessions that move flows and steps, or bind them, take turns until their transactions end. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_step(workflow_slug text, step_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
BEGIN
    PERFORM pgflow_prefect.refuse_step_queues(move_step.workflow_slug);
    IF EXISTS (SELECT FROM pgflow_prefect.moved_steps m
               WHERE m.flow_slug = move_step.workflow_slug AND m.step_slug = move_step.step_slug) THEN
        RETURN false;
    END IF;
    PERFORM pgflow_prefect.guard_tasks(true);
    PERFORM pgflow_prefect.guard_steps(true);
    INSERT INTO pgflow_prefect.moved_flows AS m (flow_slug, by_steps) VALUES (move_step.workflow_slug, true)
    ON CONFLICT (flow_slug) DO UPDATE
    SET is_ours = true, by_steps = true, moved_at = clock_timestamp(), moved_by = current_user
    WHERE NOT m.is_ours;
    INSERT INTO pgflow_prefect.moved_steps (flow_slug, step_slug) VALUES (move_step.workflow_slug, move_step.step_slug);
    UPDATE pgflow.workers w SET deprecated_at = NULL
    FROM pgflow_prefect.moved_flows m
    WHERE m.flow_slug = move_step.workflow_slug AND w.worker_id = m.worker_id AND w.deprecated_at IS NOT NULL;
    PERFORM pgflow_prefect.grant_queue(move_step.workflow_slug);
    PERFORM pgflow_prefect.sweep_step(move_step.workflow_slug, move_step.step_slug, false);
    PERFORM pg_notify('pgflow_runs', '');
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_step(text, text) IS
    'Moves one step of a flow to Prefect: its messages leave the queue. What an Edge worker has begun of it, it ends. False if '
    'it was there before. The caller has called lock_moves. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.move_step_back(workflow_slug text, step_slug text) RETURNS boolean
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    back pgflow_prefect.taken_out[];
    is_last boolean := NOT EXISTS (
        SELECT FROM pgflow_prefect.moved_steps m
        WHERE m.flow_slug <> move_step_back.workflow_slug OR m.step_slug <> move_step_back.step_slug);
BEGIN
    IF NOT EXISTS (SELECT FROM pgflow_prefect.moved_steps m -- lock_moves keeps it so
                   WHERE m.flow_slug = move_step_back.workflow_slug AND m.step_slug = move_step_back.step_slug) THEN
        RETURN false;
    END IF;
    IF is_last THEN -- before the rows: see the head of this file
        LOCK TABLE pgflow.step_tasks IN ACCESS EXCLUSIVE MODE;
    END IF;
    DELETE FROM pgflow_prefect.moved_steps m
    WHERE m.flow_slug = move_step_back.workflow_slug AND m.step_slug = move_step_back.step_slug;
    WITH gone AS (
        DELETE FROM pgflow_prefect.taken_out o
        WHERE o.flow_slug = move_step_back.workflow_slug AND o.step_slug = move_step_back.step_slug RETURNING o.*)
    SELECT array_agg(g::pgflow_prefect.taken_out) INTO back FROM gone g;
    PERFORM pgflow_prefect.put_back(move_step_back.workflow_slug, back);
    IF NOT EXISTS (SELECT FROM pgflow_prefect.moved_steps m WHERE m.flow_slug = move_step_back.workflow_slug) THEN
        UPDATE pgflow_prefect.moved_flows m
        SET is_ours = false, by_steps = false, moved_at = clock_timestamp(), moved_by = current_user
        WHERE m.flow_slug = move_step_back.workflow_slug AND m.by_steps;
        -- take_runs may hold that row and wait for the table: then its sign of life grows old by itself.
        UPDATE pgflow.workers w SET deprecated_at = clock_timestamp()
        WHERE w.worker_id IN (
            SELECT k.worker_id FROM pgflow.workers k JOIN pgflow_prefect.moved_flows m ON m.worker_id = k.worker_id
            WHERE m.flow_slug = move_step_back.workflow_slug AND NOT m.is_ours FOR NO KEY UPDATE OF k SKIP LOCKED);
    END IF;
    IF is_last THEN
        PERFORM pgflow_prefect.guard_steps(false);
        PERFORM pgflow_prefect.guard_tasks(false) WHERE NOT pgflow_prefect.needs_guard();
    END IF;
    RETURN true;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.move_step_back(text, text) IS
    'Gives one step back to pgflow''s own workers: its messages return to the queue. What our worker has begun of it, it ends. '
    'False if it was not moved. The caller has called lock_moves. Internal.';


------------------------------------------------------------------------------------------------------------
-- Messages that are nowhere: after a purge, a partial restore, or DROP SCHEMA pgflow_prefect CASCADE
------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgflow_prefect.find_lost_messages(at_most int)
RETURNS TABLE (workflow_slug text, run_id uuid, step_slug text, task_index int, message_id bigint, message jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER -- roles that only look have no right on queues, and see no message here
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    flow record;
    found int;
    wanted int := at_most;
BEGIN
    IF NOT has_schema_privilege('pgmq', 'USAGE') THEN
        RETURN; -- an owner that only shows runs
    END IF;
    FOR flow IN
        SELECT f.flow_slug, pgflow_prefect.find_queue(f.flow_slug) AS queue FROM pgflow.flows f
        WHERE EXISTS (SELECT FROM pgflow.runs r WHERE r.flow_slug = f.flow_slug AND r.status = 'started')
        ORDER BY f.flow_slug
    LOOP
        CONTINUE WHEN flow.queue IS NULL OR wanted < 1 OR NOT has_table_privilege(format('pgmq.%I', flow.queue), 'SELECT');
        RETURN QUERY EXECUTE format($query$
            SELECT t.flow_slug, t.run_id, t.step_slug, t.task_index, t.message_id,
                   jsonb_build_object(
                       'msg_id', t.message_id, 'read_ct', 0, 'enqueued_at', t.queued_at,
                       'vt', CASE WHEN t.status = 'started'
                                  THEN t.started_at + make_interval(secs => coalesce(s.opt_timeout, f.opt_timeout) + 2)
                                  ELSE clock_timestamp() END,
                       'message', jsonb_build_object('flow_slug', t.flow_slug, 'run_id', t.run_id, 'step_slug', t.step_slug,
                                                     'task_index', t.task_index))
            FROM pgflow.step_tasks t
            JOIN pgflow.runs r ON r.run_id = t.run_id AND r.status = 'started'
            JOIN pgflow.step_states a ON a.run_id = t.run_id AND a.step_slug = t.step_slug AND a.status = 'started'
            JOIN pgflow.steps s ON s.flow_slug = t.flow_slug AND s.step_slug = t.step_slug
            JOIN pgflow.flows f ON f.flow_slug = t.flow_slug
            WHERE t.flow_slug = $1 AND t.status IN ('queued', 'started') AND t.message_id IS NOT NULL
              AND %2$s IS NULL -- pgflow has archived the message of a task that it has given up
              AND NOT EXISTS (SELECT FROM pgmq.%1$I q WHERE q.msg_id = t.message_id)
              AND NOT EXISTS (SELECT FROM pgflow_prefect.taken_out o
                              WHERE o.flow_slug = t.flow_slug AND o.message_id = t.message_id AND o.run_id = t.run_id)
            ORDER BY t.message_id LIMIT $2
            $query$, flow.queue, pgflow_prefect.find_column('step_tasks', 'permanently_stalled_at', 't', 'timestamptz'))
            USING flow.flow_slug, wanted;
        GET DIAGNOSTICS found = ROW_COUNT;
        wanted := wanted - found;
    END LOOP;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.find_lost_messages(int) IS
    'Tasks that wait or are under way, and whose message is neither in their queue nor taken out, at most so many; each with '
    'the message, rebuilt. Internal.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_lost_messages(at_most int)
RETURNS TABLE (workflow_slug text, run_id uuid, step_slug text, task_index int)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY SELECT l.workflow_slug, l.run_id, l.step_slug, l.task_index FROM pgflow_prefect.find_lost_messages(at_most) l;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_lost_messages(int) IS
    'Tasks that wait or are under way, and whose message is neither in their queue nor taken out, at most so many.';


CREATE OR REPLACE FUNCTION pgflow_prefect.restore_messages(at_most int)
RETURNS TABLE (workflow_slug text, run_id uuid, step_slug text, task_index int)
LANGUAGE plpgsql VOLATILE
SET search_path = pg_catalog, pgflow_prefect, pg_temp
AS $$
#variable_conflict use_column
DECLARE
    lost record;
    queue text;
BEGIN
    PERFORM pgflow_prefect.refuse_policies();
    PERFORM pg_advisory_xact_lock(hashtextextended('pgflow_prefect.restore_messages', 0)); -- one after the other
    PERFORM pgflow_prefect.end_messages(f.flow_slug) FROM (
        SELECT DISTINCT o.flow_slug FROM pgflow_prefect.taken_out o) f;
    FOR lost IN
        SELECT l.* FROM pgflow_prefect.find_lost_messages(restore_messages.at_most) l
        WHERE has_table_privilege(format('pgmq.%I', pgflow_prefect.find_queue(l.workflow_slug)), 'INSERT')
    LOOP
        -- The task may have ended meanwhile, or be about to.
        PERFORM FROM pgflow.step_tasks t
        WHERE t.run_id = lost.run_id AND t.step_slug = lost.step_slug AND t.task_index = lost.task_index
          AND t.message_id = lost.message_id AND t.status IN ('queued', 'started')
        FOR NO KEY UPDATE SKIP LOCKED;
        CONTINUE WHEN NOT FOUND;
        workflow_slug := lost.workflow_slug;
        run_id := lost.run_id;
        step_slug := lost.step_slug;
        task_index := lost.task_index;
        PERFORM pgflow_prefect.put_in(lost.workflow_slug, ARRAY[lost.message]);
        -- A queue that was made anew would give out this id again.
        queue := pg_get_serial_sequence(format('pgmq.%I', pgflow_prefect.find_queue(lost.workflow_slug)), 'msg_id');
        PERFORM setval(queue::regclass, lost.message_id)
        WHERE coalesce(pg_sequence_last_value(queue::regclass), 0) < lost.message_id;
        RETURN NEXT;
    END LOOP;
    PERFORM pgflow_prefect.sweep_step(m.flow_slug, m.step_slug, false) FROM pgflow_prefect.moved_steps m;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.restore_messages(int) IS
    'Rebuilds messages that are nowhere, at most so many, and returns their tasks, without those of queues that the caller may '
    'not write. A task whose next attempt was not due yet is due at once.';


CREATE OR REPLACE FUNCTION pgflow_prefect.list_moved_steps()
RETURNS TABLE (workflow_slug text, step_slug text, moved_at timestamptz, moved_by text, waiting bigint, has_triggers boolean)
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pgflow_prefect, pg_temp SET row_security = off SET plan_cache_mode = force_custom_plan
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
        SELECT m.flow_slug, m.step_slug, m.moved_at, m.moved_by, coalesce(o.waiting, 0), pgflow_prefect.has_step_triggers()
        FROM pgflow_prefect.moved_steps m
        LEFT JOIN (
            SELECT t.flow_slug, t.step_slug, count(*) FILTER (WHERE i.status = 'queued') AS waiting
            FROM pgflow_prefect.taken_out t
            JOIN pgflow.step_tasks i ON i.run_id = t.run_id AND i.step_slug = t.step_slug AND i.task_index = t.task_index
            GROUP BY t.flow_slug, t.step_slug) o ON o.flow_slug = m.flow_slug AND o.step_slug = m.step_slug
        ORDER BY m.flow_slug, m.step_slug;
END
$$;

COMMENT ON FUNCTION pgflow_prefect.list_moved_steps() IS
    'The steps that were moved alone, with the number of their tasks that wait, and whether the triggers of moved steps are '
    'there.';


-- A table that was made anew has no triggers.
DO $triggers$
BEGIN
    IF EXISTS (SELECT FROM pgflow_prefect.moved_steps) THEN
        PERFORM pgflow_prefect.guard_steps(true);
    END IF;
END
$triggers$;

-- Rights: the owner's alone, until a role is granted EXECUTE. The version is set by the last script.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA pgflow_prefect FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA pgflow_prefect FROM PUBLIC;

COMMIT;
