"""The fields that JobSet (v1alpha2) and SkyPilot take, as JSON schemas: what the files in ``launch/`` may hold.

JobSet: the custom resource definition in kubernetes-sigs/jobset (config/components/crd/bases). SkyPilot: the schemas of
a task and its resources (sky/utils/schemas.py). Both without the parts that nothing here uses.
"""

from typing import Any


def _mapping(fields: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
TEXTS = {"type": "array", "items": TEXT}

JOBSET = _mapping(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": _mapping(
            {
                "network": _mapping(
                    {"enableDNSHostnames": FLAG, "publishNotReadyAddresses": FLAG, "subdomain": TEXT},
                ),
                "successPolicy": _mapping(
                    {"operator": {"enum": ["All", "Any"]}, "targetReplicatedJobs": TEXTS}, "operator"
                ),
                "failurePolicy": _mapping({"maxRestarts": COUNT, "rules": {"type": "array"}}),
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": _mapping(
                        {
                            "name": TEXT,
                            "groupName": TEXT,
                            "replicas": COUNT,
                            "template": _mapping({"metadata": {"type": "object"}, "spec": {"type": "object"}}),
                        },
                        "name",
                        "template",
                    ),
                },
                "suspend": FLAG,
                "ttlSecondsAfterFinished": COUNT,
                "managedBy": TEXT,
                "coordinator": {"type": "object"},
            },
            "replicatedJobs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)

SKYPILOT = _mapping(
    {
        "name": TEXT,
        "workdir": TEXT,
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": _mapping(
            {
                "infra": {"type": "string", "pattern": r"^(\*|[a-z0-9]+)(/.+)?$"},
                "accelerators": {"type": "string", "pattern": r"^[\w-]+:[0-9]+$"},
                "cpus": {"type": "string", "pattern": r"^[0-9]+\+?$"},
                "memory": {"type": "string", "pattern": r"^[0-9]+\+?$"},
                "use_spot": FLAG,
                "disk_size": {"type": "integer"},
                "image_id": {"type": "string", "pattern": "^docker:"},
                "job_recovery": _mapping(
                    {
                        "strategy": {"type": ["string", "null"]},
                        "max_restarts_on_errors": COUNT,
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                            "uniqueItems": True,
                        },
                    }
                ),
            }
        ),
        "volumes": {"type": "object", "patternProperties": {"^/": TEXT}, "additionalProperties": False},
        "file_mounts": {"type": "object"},
        "envs": {"type": "object", "additionalProperties": TEXT},
        "secrets": {"type": "object"},
        "setup": TEXT,
        "run": TEXT,
    }
)
