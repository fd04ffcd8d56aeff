import torch

from longvlm.pipeline.engine.growing import Growing

ENDS = torch.tensor([2, 7])


def test_a_row_grows_until_it_ends_is_full_or_overflows():
    rows = Growing([4, 5, 6, 3], [9, 2, 9, 9], None, ENDS)
    assert rows.count_open() == 4
    rows.extend(torch.tensor([3, 4, 2, -1]))
    assert rows.count_open() == 2
    assert rows.newest_R[:2].tolist() == [3, 4]
    assert rows.at_R.tolist() == [4, 5, 5, 2]  # closed ones stay where their last token went in
    rows.extend(torch.tensor([5, 6, 8, 8]))
    rows.extend(torch.tensor([7, 9, 9, 9]))
    assert rows.fetch() == ([[3, 5, 7], [4, 6], [2], []], [False] * 4, [False, False, False, True])


def test_rows_are_kept_and_joined_with_their_random_numbers():
    drawn = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    rows = Growing([4, 5], [3, 3], drawn, ENDS)
    rows.extend(torch.tensor([3, 4]))
    assert rows.drawn.tolist() == drawn[:, 1].tolist()
    rows.keep(torch.tensor([1]))
    more = Growing([2], [5], torch.tensor([[0.7, 0.8, 0.9, 0.95, 0.99]]), ENDS)
    more.extend(torch.tensor([6]))
    rows.append(more)
    assert torch.allclose(rows.drawn, torch.tensor([0.5, 0.8]))
    rows.extend(torch.tensor([5, 5]))
    rows.extend(torch.tensor([5, 5]))
    assert rows.count_open() == 1
    rows.extend(torch.tensor([8, 8]))
    rows.extend(torch.tensor([8, 8]))
    assert rows.fetch()[0] == [[4, 5, 5], [6, 5, 5, 8, 8]]
    assert rows.count_open() == 0


def test_a_token_is_put_in_the_place_of_the_newest_and_may_end_its_row():
    rows = Growing([4, 5, 6], [9, 9, 9], None, ENDS)
    rows.extend(torch.tensor([3, 4, 5]))
    rows.extend(torch.tensor([6, 6, 2]))
    assert rows.fetch_newest() == ([6, 6, 5], [True, True, False])
    rows.replace([0, 1], [8, 7])
    assert rows.count_open() == 1
    assert rows.newest_R.tolist()[0] == 8
    assert rows.fetch()[0] == [[3, 8], [4, 7], [5, 2]]
