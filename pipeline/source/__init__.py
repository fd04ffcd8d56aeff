"""Sources of videos: listings of folders, buckets and manifests, and local copies of remote objects."""
