-- The alerts of `longvlm nightly` where --alerts names no other file: each query that returns rows is one. A line
-- `-- name: ...` stands above each. They see all views; `runs` holds the row of the nightly under way already, so that
-- a query can be tried with `longvlm sql` on any day.

-- name: a part of the nightly stopped
SELECT run_id, part, stopped FROM (
    SELECT run_id, unnest(['index', 'answer', 'maintain']) AS part,
        unnest([counts->>'$.index.stopped', counts->>'$.answer.stopped', counts->>'$.maintain.stopped']) AS stopped
    FROM (FROM runs WHERE job = 'nightly' ORDER BY seq DESC LIMIT 1)
)
WHERE stopped IS NOT NULL;

-- name: more than a twentieth of the videos that were watched failed
SELECT run_id, failed, indexed, failures FROM (
    SELECT run_id, (counts->>'$.index.failed')::BIGINT AS failed, (counts->>'$.index.indexed')::BIGINT AS indexed,
        counts->>'$.index.failures' AS failures
    FROM runs WHERE job = 'nightly' ORDER BY seq DESC LIMIT 1
)
WHERE failed > 0.05 * (failed + indexed);

-- name: videos wait, and none was indexed for three days
SELECT count(*) AS num_runs, min(num_waiting) AS num_waiting FROM (
    SELECT (counts->>'$.index.not_attempted')::BIGINT + (counts->>'$.index.failed')::BIGINT AS num_waiting,
        (counts->>'$.index.indexed')::BIGINT AS num_indexed
    FROM runs WHERE job = 'nightly' AND finished_at > (SELECT max(finished_at) FROM runs) - INTERVAL 3 DAY
)
HAVING min(num_waiting) > 0 AND sum(num_indexed) = 0
    AND (SELECT min(finished_at) < max(finished_at) - INTERVAL 3 DAY FROM runs);

-- name: more than a fifth of the videos were replaced and could not be indexed again
SELECT count(*) FILTER (outdated) AS num_outdated, count(*) AS num_videos
FROM videos WHERE status = 'indexed' HAVING count(*) FILTER (outdated) > 0.2 * count(*);

-- name: more than a tenth of the questions failed
SELECT run_id, failed, num_asked FROM (
    SELECT run_id, (counts->>'$.answer.failed')::BIGINT AS failed, (counts->>'$.answer.asked')::BIGINT
        - (counts->>'$.answer.reused')::BIGINT - (counts->>'$.answer.not_attempted')::BIGINT AS num_asked
    FROM runs WHERE job = 'nightly' ORDER BY seq DESC LIMIT 1
)
WHERE failed > 0.1 * num_asked;
