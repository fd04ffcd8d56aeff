-- The views of a store. They stand on seven relations with the columns of schemas/tables.py, made beforehand from pinned
-- files: ledger_videos, ledger_segments, ledger_tokens, ledger_answers, ledger_verdicts, ledger_recipes, ledger_runs.
-- Newest = largest (seq, write_id). A row that says `deleted` ends every recipe of its video.

-- What tells one content of a file from another: size and etag, and the time of change only where there is no etag.
CREATE MACRO content_of(size_bytes, etag, modified_at) AS (size_bytes, coalesce(nullif(etag, ''), modified_at::VARCHAR));

-- The recipe whose videos the views below show: the one promoted last.
CREATE VIEW active_recipe AS
SELECT recipe FROM ledger_recipes WHERE event = 'promoted' ORDER BY seq DESC, recipe DESC LIMIT 1;

-- A video that was forgotten stays away, whatever is written of it later, until a plain deletion lifts that.
CREATE VIEW deletions AS
SELECT video_id, max((seq, coalesce(write_id, ''))) AS deleted_at,
    coalesce(arg_max(coalesce(error_code, ''), seq) = 'forgotten', false) AS is_forgotten
FROM ledger_videos WHERE status = 'deleted' GROUP BY video_id;

-- The newest row of any status, per video and recipe.
CREATE VIEW newest_rows AS
SELECT n.* EXCLUDE (is_deleted, deleted_at) REPLACE (
        CASE WHEN n.is_deleted THEN 'deleted' ELSE n.status END AS status,
        CASE WHEN n.is_deleted THEN n.deleted_at[1] ELSE n.seq END AS seq
    )
FROM (
    SELECT r.*, d.deleted_at,
        coalesce(d.is_forgotten OR d.deleted_at > (r.seq, coalesce(r.write_id, '')), false) AS is_deleted
    FROM (
        FROM ledger_videos
        QUALIFY row_number() OVER (PARTITION BY video_id, recipe ORDER BY seq DESC, write_id DESC NULLS LAST) = 1
    ) r
    LEFT JOIN deletions d USING (video_id)
) n;

-- What is live, per video and recipe: of the rows that are indexed or deleted, the newest is indexed.
-- `outdated`: a later row of the video, failed or of another recipe, saw another content.
CREATE VIEW live_videos AS
WITH indexed AS (
    FROM ledger_videos WHERE status = 'indexed'
    QUALIFY row_number() OVER (PARTITION BY video_id, recipe ORDER BY seq DESC, write_id DESC) = 1
),
seen AS (
    SELECT video_id, max(seq) AS seq, arg_max(content_of(size_bytes, etag, modified_at), seq) AS content
    FROM ledger_videos WHERE status <> 'deleted' GROUP BY video_id
)
SELECT i.*,
    s.seq > i.seq AND s.content IS DISTINCT FROM content_of(i.size_bytes, i.etag, i.modified_at) AS outdated
FROM indexed i
JOIN seen s USING (video_id)
LEFT JOIN deletions d USING (video_id)
WHERE d.deleted_at IS NULL OR (NOT d.is_forgotten AND (i.seq, i.write_id) > d.deleted_at);

-- Whose last indexing failed, per video and recipe; `is_live` where an older version can still be asked.
CREATE VIEW failed_videos AS
SELECT n.*, l.write_id IS NOT NULL AS is_live
FROM newest_rows n
LEFT JOIN (SELECT video_id, recipe, write_id FROM live_videos) l USING (video_id, recipe)
WHERE n.status = 'failed';

-- One row a video: the live one, or else what it failed of.
CREATE VIEW videos AS
FROM live_videos WHERE recipe = (FROM active_recipe)
UNION ALL BY NAME
SELECT * EXCLUDE (is_live), false AS outdated
FROM failed_videos WHERE recipe = (FROM active_recipe) AND NOT is_live;

CREATE VIEW failures AS
SELECT video_id, uri, external_id, source, recipe, error_code, error, attempts, is_live, size_bytes, run_id,
    make_timestamp(seq) AS failed_at
FROM failed_videos WHERE recipe = (FROM active_recipe);

-- A video that was moved took over the writes of another: its own id and uri stand in place of those that were written.
CREATE VIEW segments AS
SELECT s.* REPLACE (v.video_id AS video_id), v.uri, v.external_id
FROM ledger_segments s
JOIN (
    SELECT write_id, video_id, uri, external_id FROM live_videos WHERE recipe = (FROM active_recipe)
) v USING (write_id);

CREATE VIEW tokens AS
SELECT t.* REPLACE (v.video_id AS video_id), v.uri, v.external_id
FROM ledger_tokens t
JOIN (
    SELECT write_id, video_id, uri, external_id FROM live_videos WHERE recipe = (FROM active_recipe)
) v USING (write_id);

-- Answers from what is live under any recipe, each question's newest, whatever its status; `recipe` is that of the
-- tokens. Models that read the same tokens, and settings of one model, stand side by side through a join:
--   SELECT a.uri, a.question, a.answer AS of_a, b.answer AS of_b,
--     coalesce(a.value, a.answer) = coalesce(b.value, b.answer) AS agree  -- a text has no value
--   FROM answers a JOIN answers b USING (write_id, question_id, question_hash)
--   WHERE a.model = 'A' AND b.model = 'B'  -- or a.answer_recipe and b.answer_recipe
-- The view answers_wide, one typed column a question, is made by schemas/sql_text.py: its columns are data.
CREATE VIEW answers AS
SELECT a.* REPLACE (v.video_id AS video_id, v.uri AS uri), v.external_id, v.recipe
FROM ledger_answers a
JOIN (SELECT write_id, video_id, uri, external_id, recipe FROM live_videos) v USING (write_id)
QUALIFY row_number() OVER (
    PARTITION BY a.write_id, a.question_id, a.question_hash, a.answer_recipe
    ORDER BY a.seq DESC NULLS LAST, a.created_at DESC, a.run_id DESC
) = 1;

-- What judges said of answers from what is live, each newest. Two evaluations side by side, question by question:
--   SELECT a.uri, a.question, a.reference, a.prediction AS of_a, b.prediction AS of_b, a.score, b.score
--   FROM verdicts a JOIN verdicts b USING (benchmark, dimension, write_id, question_id, question, reference)
--   WHERE a.model = 'A' AND b.model = 'B'  -- or a.answer_recipe and b.answer_recipe, or a.judge and b.judge
CREATE VIEW verdicts AS
SELECT c.* REPLACE (v.video_id AS video_id, v.uri AS uri), v.external_id, v.recipe
FROM ledger_verdicts c
JOIN (SELECT write_id, video_id, uri, external_id, recipe FROM live_videos) v USING (write_id)
QUALIFY row_number() OVER (
    PARTITION BY c.write_id, c.benchmark, c.dimension, c.question_id, c.question, c.reference, c.answer_recipe, c.judge
    ORDER BY c.seq DESC NULLS LAST, c.created_at DESC, c.run_id DESC
) = 1;

-- Evaluations in the large, a row each: means over what was judged. How many questions a benchmark has is known to its
-- file alone; `longvlm evaluate` counts those that are missing.
CREATE VIEW scores AS
SELECT benchmark, dimension, model, answer_recipe, judge, count(*) AS num_verdicts,
    count(*) FILTER (status = 'judged') AS num_judged,
    avg(score) FILTER (status = 'judged') AS score,
    avg(is_right::INTEGER) FILTER (status = 'judged') AS accuracy
FROM verdicts GROUP BY ALL;

-- One row a recipe: under its newest name and model, since when it is known, and whether the views show it.
CREATE VIEW recipes AS
SELECT recipe, arg_max(name, seq) AS name, arg_max(spec, seq) AS spec, arg_max(model, seq) AS model,
    recipe IS NOT DISTINCT FROM (FROM active_recipe) AS active, min(seq) AS registered_seq
FROM ledger_recipes WHERE event = 'registered' GROUP BY recipe;

CREATE VIEW runs AS
SELECT *, make_timestamp(seq) AS finished_at FROM ledger_runs;
