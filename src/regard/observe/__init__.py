from regard.observe.record import READINGS, Record, Sinks, record
from regard.observe.roles import THRESHOLDS, Roles, ablated, roles
