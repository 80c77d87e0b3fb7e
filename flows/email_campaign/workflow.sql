-- The workflow of flows/email_campaign.py, as pgflow defines workflows: in SQL.

INSERT INTO pgflow.workflows (slug) VALUES ('email_campaign');

INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
    ('email_campaign', 'prepare_list'),
    ('email_campaign', 'send_emails'),
    ('email_campaign', 'generate_report');

-- send_emails waits for prepare_list, and generate_report for send_emails
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
    ('email_campaign', 'prepare_list', 'send_emails'),
    ('email_campaign', 'send_emails', 'generate_report');
