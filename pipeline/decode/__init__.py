"""Frame sampling and decoding of video files, in a child process where a bad file can do no harm."""
