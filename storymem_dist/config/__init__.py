"""The configuration: every group's settings in one typed schema, composed by Hydra from ``conf/``.

The settings of a group live next to the code they set; only those of the whole job (``schema``) and of launching
(``launch``) live here.
"""
