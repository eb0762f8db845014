//! A probe guest to be run.

/// What `ferry run` is told. The default is small and quick: 128 MiB, one vCPU, 1,000 uniform writes a second.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// `log` or `ring`.
    pub dirty: &'static str,
    /// The probe's command line, without the vCPUs.
    pub work: String,
    /// Further arguments: disks, network cards, the restart policy.
    pub devices: Vec<String>,
}

impl Guest {
    /// A guest that writes a little.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            memory_mib: 128,
            vcpus: 1,
            dirty: "log",
            work: "fill=random fill_mib=16 work=uniform work_mib=16 rate=1000 heartbeat_ms=20".to_owned(),
            devices: Vec::new(),
        }
    }

    /// The same with another probe command line.
    #[must_use]
    pub fn work(mut self, work: &str) -> Self {
        work.clone_into(&mut self.work);
        self
    }

    /// The same with so much memory.
    #[must_use]
    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// The same with so many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// The same with dirty pages tracked by `log` or `ring`.
    #[must_use]
    pub fn dirty(mut self, dirty: &'static str) -> Self {
        self.dirty = dirty;
        self
    }

    /// The same with this disk (`path=…`).
    #[must_use]
    pub fn disk(self, disk: &str) -> Self {
        self.device("--disk", disk)
    }

    /// The same with this network card (`bridge=…`, `tap=…`).
    #[must_use]
    pub fn nic(self, nic: &str) -> Self {
        self.device("--net", nic)
    }

    /// The same with this restart policy.
    #[must_use]
    pub fn restart(self, policy: &str) -> Self {
        self.device("--restart", policy)
    }

    /// The same with its memory from the pool of huge pages.
    #[must_use]
    pub fn hugepages(mut self) -> Self {
        self.devices.push("--hugepages".to_owned());
        self
    }

    fn device(mut self, flag: &str, device: &str) -> Self {
        self.devices.extend([flag, device].map(str::to_owned));
        self
    }

    /// The arguments of `ferry run`.
    #[must_use]
    pub fn arguments(&self, kernel: &str) -> Vec<String> {
        let memory = format!("{}M", self.memory_mib);
        let cmdline = format!("cpus={} {}", self.vcpus, self.work);
        let vcpus = self.vcpus.to_string();
        let words = [
            "run", &self.name, "--kernel", kernel, "--memory", &memory, "--vcpus", &vcpus, "--dirty", self.dirty,
        ];
        words
            .into_iter()
            .chain(["--cmdline", &cmdline])
            .map(str::to_owned)
            .chain(self.devices.iter().cloned())
            .collect()
    }
}
