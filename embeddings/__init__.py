"""The towers: how items and users become vectors. Per event and per query it is numpy alone."""
