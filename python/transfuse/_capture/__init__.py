"""How transfuse.capture() follows a loader; use transfuse.capture, not this package."""
