"""What happens in which order: the loop, the model, the processes, the record."""

import common  # noqa: F401  # which takes note of the launcher, before torch is imported for seconds
