"""Pictures and videos from wherever they come, and videos to files: nothing here knows of networks."""
