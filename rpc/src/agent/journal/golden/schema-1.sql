-- A journal as ferry wrote it with schema 1. Never changed.
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

CREATE TABLE instances(
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  status TEXT NOT NULL,       -- running paused stopped crashed incoming indeterminate
  epoch INTEGER NOT NULL,     -- the right under which it runs or ran here
  known_epoch INTEGER NOT NULL, -- the highest epoch heard of
  spec TEXT NOT NULL,         -- JSON
  migration TEXT,             -- the last or present one
  reason TEXT,                -- why it is crashed or stopped
  boot_id TEXT NOT NULL       -- the host's boot in which it last ran here
) STRICT;

-- Instances that left, and where to.
CREATE TABLE departed(
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  host TEXT NOT NULL,
  migration TEXT NOT NULL
) STRICT;

CREATE TABLE migrations(
  id TEXT PRIMARY KEY,
  instance TEXT NOT NULL,
  role TEXT NOT NULL,         -- source destination
  peer TEXT NOT NULL,         -- the other host
  epoch INTEGER NOT NULL,     -- the source's, when it began
  over INTEGER NOT NULL,      -- 1: nothing is left to do
  armed INTEGER NOT NULL,     -- at the source: the newest attempt that is ARMED, 0 for none
  said TEXT,                  -- at the source: what D said
  resumed INTEGER,            -- at the source: the epoch of RESUMED
  user_paused INTEGER NOT NULL,
  options TEXT NOT NULL,      -- JSON
  info TEXT NOT NULL,         -- JSON: the last report
  began INTEGER NOT NULL      -- unix time, milliseconds
) STRICT;
CREATE INDEX migrations_by_instance ON migrations(instance);

-- D(M,n), at the destination.
CREATE TABLE decisions(
  migration TEXT NOT NULL,
  attempt INTEGER NOT NULL,
  decision TEXT NOT NULL,     -- OPEN CLAIMED RUNNING SRC
  boot_id TEXT NOT NULL,      -- the host's boot in which it was written
  PRIMARY KEY(migration, attempt)
) STRICT;

INSERT INTO meta VALUES('host','a');
INSERT INTO instances VALUES('00000000-0000-0000-0000-000000000001','web','running',4,5,
  '{"name":"web","memory_bytes":67108864,"vcpus":2,"cpu":"host","dirty":"log","kernel":"k","initrd":"","cmdline":"quiet","hugepages":false,"disks":[{"path":"/srv/web.img","readonly":false,"serial":null}],"nics":[]}',
  '00000000-0000-0000-0000-00000000000a',NULL,'boot-1');
INSERT INTO instances VALUES('00000000-0000-0000-0000-000000000002','old','crashed',1,1,
  '{"name":"old","memory_bytes":67108864,"vcpus":1}',NULL,'the VMM died','boot-0');
INSERT INTO departed VALUES('00000000-0000-0000-0000-000000000003','gone','b','00000000-0000-0000-0000-00000000000b');
INSERT INTO migrations VALUES('00000000-0000-0000-0000-00000000000a','00000000-0000-0000-0000-000000000001','source','b',4,0,1,NULL,NULL,0,
  '{"max_downtime_us":300000,"timeout_ms":900000}','{"id":"00000000-0000-0000-0000-00000000000a","status":"switching"}',1700000000000);
INSERT INTO decisions VALUES('00000000-0000-0000-0000-00000000000c',1,'SRC','boot-0');
PRAGMA user_version=1;
