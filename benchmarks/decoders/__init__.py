"""What a sampled frame costs by each decoder, and whether it is right, by codec, size and length of groups.

clips.py a moving scene encoded in many ways, and the lent clips
ways.py  the decoders: the project's own, decord, torchcodec
steps.py what a frame passes through from its file to its tower
"""
