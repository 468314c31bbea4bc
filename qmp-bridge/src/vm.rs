//! Facts about the VM that a checkpoint records and a restore needs.

use crate::migration::Progress;
use crate::qmp::replies::{CpuInfo, MemoryInfo};
use crate::qmp::{QemuVersion, Qmp, QmpError};
use serde_json::json;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Linux KVM.
    Kvm,
    /// TCG, or another that QMP does not tell apart from it.
    Tcg,
}

impl Accelerator {
    /// The word for `-accel`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Announces on the network where the VM is now; a VM without a network has nothing to announce.
pub async fn announce(qmp: &Qmp) {
    let arguments = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
    if let Err(error) = qmp.execute_json("announce-self", arguments).await {
        tracing::debug!(%error, "announce-self");
    }
}

/// What a VM is built of, as far as a restore must rebuild it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmFacts {
    /// QEMU's version.
    pub qemu: QemuVersion,
    /// Versioned machine type, e.g. `pc-i440fx-10.0`.
    pub machine_type: String,
    /// Name of the main RAM block of a VM without a memory backend.
    pub default_ram_id: Option<String>,
    /// Id of the `-machine memory-backend=` object, if any: the name of the main RAM block.
    pub ram_backend: Option<String>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Base memory in bytes, without hot-plugged modules.
    pub ram_bytes: u64,
    /// Hot-plugged memory in bytes.
    pub plugged_bytes: u64,
    /// What runs the guest's code.
    pub accelerator: Accelerator,
    /// Why QEMU itself says that this VM cannot be migrated; empty if it can.
    pub migration_blockers: Vec<String>,
}

impl VmFacts {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer, or lacks something that all supported versions have.
    pub async fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        let machine_type = machine_type(qmp).await?;
        let types = qmp.query_machine_types().await?;
        let own = types.into_iter().find(|known| known.name == machine_type);
        let Composition { vcpus, memory, migration_blockers } = Composition::read(qmp).await?;
        let is_kvm = qmp.query_kvm().await?.enabled;
        Ok(Self {
            qemu: qmp.version().clone(),
            default_ram_id: own.and_then(|own| own.default_ram_id),
            machine_type,
            ram_backend: ram_backend(qmp).await?,
            vcpus: u32::try_from(vcpus.len()).unwrap_or(u32::MAX),
            ram_bytes: memory.base_memory,
            plugged_bytes: memory.plugged_memory,
            accelerator: if is_kvm { Accelerator::Kvm } else { Accelerator::Tcg },
            migration_blockers,
        })
    }
}

/// What a VM has besides devices, RAM blocks and disks, and can gain or lose while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Composition {
    vcpus: Vec<CpuInfo>,
    memory: MemoryInfo,
    /// Why QEMU says that this VM cannot be migrated now.
    pub migration_blockers: Vec<String>,
}

impl Composition {
    /// Asks QEMU.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn read(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self {
            vcpus: qmp.query_cpus().await?,
            memory: qmp.query_memory_size().await?,
            migration_blockers: Progress::query(qmp).await?.blocked_reasons,
        })
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u32 {
        u32::try_from(self.vcpus.len()).unwrap_or(u32::MAX)
    }

    /// What differs, in words.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.vcpus != now.vcpus {
            return Some(format!("it has {} vCPUs, and had {}", now.vcpus.len(), self.vcpus.len()));
        }
        if self.memory != now.memory {
            return Some(format!(
                "{} bytes of memory are plugged in, and {} were",
                now.memory.plugged_memory, self.memory.plugged_memory
            ));
        }
        let blocker =
            now.migration_blockers.iter().find(|why| !self.migration_blockers.contains(why));
        blocker.map(|why| format!("QEMU says since then that its state cannot be saved: {why}"))
    }
}

async fn machine_type(qmp: &Qmp) -> Result<String, QmpError> {
    let class: String = qmp.qom_get("/machine", "type").await?;
    match class.strip_suffix("-machine") {
        Some(name) => Ok(name.into()),
        None => Err(QmpError::unexpected("qom-get /machine type", "a machine type", &class.into())),
    }
}

/// QEMU answers with a path such as `/objects/pc.ram`; the name without `memory-backend=` is empty
/// or generated.
async fn ram_backend(qmp: &Qmp) -> Result<Option<String>, QmpError> {
    match qmp.qom_get::<String>("/machine", "memory-backend").await {
        Ok(path) => Ok(path.rsplit('/').next().filter(|id| !id.is_empty()).map(Into::into)),
        // Some VMs (`none`, microvm variants) lack the property.
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}
