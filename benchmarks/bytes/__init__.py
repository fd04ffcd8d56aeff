"""How many bytes of long videos in a bucket keyframe mode reads, and how much sooner it is done.

server.py   an S3 server that is as far away and as slow as a real one, and counts
corpus.py   long files made of real clips
watching.py the decode stage over a bucket, in as many processes as there are cores
"""
