import http.client
from urllib.parse import urlsplit

import pytest

import longvlm
from longvlm.schemas.errors import InputError


def get(address, **headers):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request("GET", parts.path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_a_notebook_shows_the_page_of_a_video_in_a_frame(shown, videos_by_name):
    index = longvlm.open(str(shown / "store"))
    frame = index.show("tiny-3-00000", 6.5)
    write_id = videos_by_name["tiny-3-00000"]["write_id"]
    assert repr(frame).endswith(f"/video/{write_id}#t=6.500")
    assert f'src="{frame.address}"' in frame._repr_html_()
    status, headers, page = get(frame.address)
    assert (status, b'id="player"' in page) == (200, True)
    allowed = headers["Content-Security-Policy"].partition("frame-ancestors ")[2]
    assert "http://localhost:*" in allowed.split(" ")
    assert "*" not in allowed.split(" ")
    status, headers, part = get(frame.address.replace("/video/", "/media/"), Range="bytes=0-99")
    assert (status, len(part)) == (206, 100)
    assert urlsplit(index.show("tiny-3-00001").address).port == urlsplit(frame.address).port  # one server a store
    assert get(frame.address, Host="elsewhere.example")[0] == 421


def test_a_video_that_is_not_there_is_a_sentence(shown):
    with pytest.raises(InputError, match="no live video is called"):
        longvlm.open(str(shown / "store")).show("nowhere")
