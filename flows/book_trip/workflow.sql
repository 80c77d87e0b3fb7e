-- The workflows of flows/book_trip.py: a map of children, each of which is a run of the workflow book_leg.

INSERT INTO pgflow.workflows (slug) VALUES ('book_leg'), ('book_trip');

INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
    ('book_leg', 'reserve'),
    ('book_leg', 'pay'),
    ('book_trip', 'plan'),
    ('book_trip', 'confirm');

-- each leg is a run of book_leg, with the leg as its payload; a run that fails is followed by one other
INSERT INTO pgflow.steps (workflow_slug, slug, step_type, map_over, child_workflow, child_payload, child_retries) VALUES
    ('book_trip', 'book', 'map', 'plan', 'book_leg', '{item}', 1);

INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
    ('book_leg', 'reserve', 'pay'),
    ('book_trip', 'plan', 'book'),
    ('book_trip', 'book', 'confirm');
