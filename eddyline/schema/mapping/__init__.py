"""Maps: records of foreign formats become records of `clicks`, `items` and `users`.

A map is a TOML file. It is compiled once; mapping a record is then a pure function of the record
and of the map. `spec` has the format, `presets` the maps that come with Eddyline.
"""
