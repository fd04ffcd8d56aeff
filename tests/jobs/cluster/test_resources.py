import pytest

from longvlm.jobs.cluster.resources import MAX_PARTS, PART_DECODE_S, WRITER_CPUS, for_answer, for_index, num_parts

CLUSTERS = [{"CPU": 1}, {"CPU": 2}, {"CPU": 16}, {"CPU": 64, "GPU": 4}, {"CPU": 2, "GPU": 1}, {"CPU": 8, "GPU": 8}]


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("num_videos", [1, 100, 100_000])
def test_all_stages_fit_the_cluster_at_once(cluster, num_videos):
    r = for_index(cluster, num_videos)
    cpus = r.decoders * r.decoder_cpus + r.encoders * r.encoder_cpus + r.writers * WRITER_CPUS
    assert -1e-9 < cluster["CPU"] - cpus < min(r.decoder_cpus, r.encoder_cpus)  # nothing more, until a node joins
    assert r.encoders * r.encoder_gpus <= cluster.get("GPU", 0)
    assert 1 <= r.videos_per_block <= 16
    assert min(r.decoders, r.encoders, r.encoder_threads) >= 1


def test_every_gpu_gets_an_encoder_and_an_answerer():
    cluster = {"CPU": 32, "GPU": 4}
    assert for_index(cluster, 1000).encoders == for_answer(cluster, 1000).answerers == 4


def test_encoders_grow_with_gpus_and_writers_with_encoders():
    r = for_index({"CPU": 64, "GPU": 4}, 1000)
    assert (r.encoders, r.most_encoders, r.writers, r.most_writers) == (4, 16, 1, 4)
    r = for_index({"CPU": 64}, 1000)
    assert (r.encoders, r.most_encoders, r.writers, r.most_writers) == (8, 8, 2, 2)


@pytest.mark.parametrize("cluster", [{"CPU": 16, "GPU": 1}, {"CPU": 64, "GPU": 4}, {"CPU": 2, "GPU": 1}])
def test_where_gpus_decode_they_have_room_for_all_who_ask(cluster):
    r = for_index(cluster, 1000, decodes_on_gpu=True)
    assert 0 < r.decoders * r.decoder_gpus + r.encoders * r.encoder_gpus <= cluster["GPU"] + 1e-9
    assert r.encoders == cluster["GPU"]
    assert r.decoders <= 8 * cluster["GPU"]
    assert for_index({"CPU": 4}, 10, decodes_on_gpu=True) == for_index({"CPU": 4}, 10)


def test_long_videos_are_shared_out_in_parts_of_minutes_but_not_too_many():
    assert [num_parts(times * PART_DECODE_S) for times in (0, 1, 1.1, 6, 1e4)] == [1, 1, 2, 6, MAX_PARTS]


def test_small_runs_keep_every_decoder_busy():
    r = for_index({"CPU": 8}, 32)
    assert r.videos_per_block * r.decoders <= 32


@pytest.mark.parametrize("cluster", [{"CPU": 1}, {"CPU": 16}, {"CPU": 64, "GPU": 8}])
@pytest.mark.parametrize("num_questions", [1, 100, 10_000, 10_000_000])
def test_answer_blocks_are_some_hundred_questions_and_spread(cluster, num_questions):
    r = for_answer(cluster, num_questions)
    assert r.answerers * r.cpus <= cluster["CPU"]
    assert 64 <= r.questions_per_block <= 512
    assert r.questions_per_block == 64 or r.questions_per_block * r.answerers <= num_questions
    assert r.kv_bytes is None


def test_memory_for_keys_and_values_is_what_was_asked_for():
    assert for_answer({"CPU": 2}, 10, kv_gb=1.5).kv_bytes == 1_500_000_000
