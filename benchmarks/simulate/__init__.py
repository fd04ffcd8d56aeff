"""A simulated world: jobs, people, clocks and rot take turns over a store, and a model says what a reader must see.

    turns.py   a history as data: drawn from a seed, printed, shrunk
    world.py   actors that run real jobs, one at a time, and the points at which the world may come in between
    seams.py   what of the project is put on points: the clock, files and logs of a store
    served.py  the same over a bucket: an S3 server of which every request is a point
    jobs.py    the jobs that actors run, with stand-ins for watching a video and for a language model
    people.py  the bucket that videos lie in, and what people do to it
    reader.py  a reader of logs and files that shares no code with the store
    rot.py     what becomes of files by themselves
    model.py   what that reader must see, whatever came in between
    faults.py  the mendings of the store, each of which can be taken out, to see that the model notices
    run.py     a history played, and the smallest one that fails likewise

FoundationDB and TigerBeetle test databases so; the way to learn of a race that nobody rehearsed is to draw it.
"""
