-- A journal as ferry wrote it with schema 2. Never changed.
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

ALTER TABLE instances ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0; -- starts by its policy in a row
ALTER TABLE instances ADD COLUMN restart_at INTEGER;                  -- unix time, milliseconds: when the next one is due
ALTER TABLE instances ADD COLUMN asked_off INTEGER NOT NULL DEFAULT 0; -- 1: its user asked the guest to switch off
ALTER TABLE instances ADD COLUMN started INTEGER NOT NULL DEFAULT 0;  -- unix time, milliseconds: when it last began to run here

-- Guests that came here and whose source has not acknowledged that yet.
CREATE TABLE arrivals(
  migration TEXT PRIMARY KEY,
  instance TEXT NOT NULL,
  source TEXT NOT NULL,       -- the host that it came from
  attempt INTEGER NOT NULL
) STRICT;

-- Who did what. Rows are added and never changed.
CREATE TABLE audit(
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  time TEXT NOT NULL,         -- RFC 3339, UTC
  actor TEXT NOT NULL,        -- the unix user who asked, another host, or the agent itself
  request TEXT NOT NULL,      -- the request's id
  what TEXT NOT NULL,         -- run delete stop migrate abort resolve restart destroy-stale
  instance TEXT NOT NULL,     -- its id, or the name that was asked for
  result TEXT NOT NULL        -- done, or why not
) STRICT;
CREATE TRIGGER audit_keeps_its_rows BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
CREATE TRIGGER audit_does_not_change BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;
-- INSERT OR REPLACE would delete without the first trigger.
CREATE TRIGGER audit_is_not_replaced BEFORE INSERT ON audit WHEN EXISTS(SELECT 1 FROM audit WHERE id = NEW.id)
BEGIN SELECT RAISE(ABORT, 'the audit table is append-only'); END;

INSERT INTO meta VALUES('host','b');
INSERT INTO instances VALUES('00000000-0000-0000-0000-000000000001','web','crashed',5,5,
  '{"name":"web","memory_bytes":67108864,"vcpus":2,"cpu":"host","dirty":"log","kernel":"k","initrd":"","cmdline":"quiet","hugepages":false,"disks":[],"nics":[],"restart":"on-crash"}',
  '00000000-0000-0000-0000-00000000000a','the VMM died; it is started again in 8s, start 3 in a row','boot-1',3,1700000060000,0,1700000000000);
INSERT INTO migrations VALUES('00000000-0000-0000-0000-00000000000a','00000000-0000-0000-0000-000000000001','destination','a',4,1,0,NULL,NULL,0,
  '{}','{"id":"00000000-0000-0000-0000-00000000000a","status":"completed"}',1700000000000);
INSERT INTO decisions VALUES('00000000-0000-0000-0000-00000000000a',1,'RUNNING','boot-1');
INSERT INTO arrivals VALUES('00000000-0000-0000-0000-00000000000a','00000000-0000-0000-0000-000000000001','a',1);
INSERT INTO audit VALUES(7,'2024-01-01T00:00:00Z','root (uid 0)','9b1deb4d-3b7d-4bad-9bdd-2b0d7b3dcb6d','migrate','web','done');
PRAGMA user_version=2;
