//! Sessions against a QEMU that is a table of settings and a list of what was asked of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::*;
use crate::migration::MigrationError;
use crate::paused::Paused;
use crate::qmp::Qmp;
use crate::qmp::test::{Peer, pair};

/// What the fake QEMU is and has heard.
#[derive(Debug, Default)]
struct Fake {
    capabilities: BTreeMap<String, bool>,
    parameters: BTreeMap<String, Value>,
    objects: Vec<String>,
    status: Value,
    state: &'static str,
    /// Commands to refuse once.
    refuse: Vec<&'static str>,
    log: Vec<String>,
    journal: PathBuf,
    /// Whether the journal was there at each change.
    journaled: Vec<bool>,
}

impl Fake {
    fn answer(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let asks = command.starts_with("query") || command == "qom-list";
        if !asks {
            self.log.push(command.into());
        }
        if command.starts_with("migrate-set") || command == "object-add" || command == "getfd" {
            self.journaled.push(self.journal.exists());
        }
        if let Some(at) = self.refuse.iter().position(|refused| *refused == command) {
            self.refuse.remove(at);
            return Err(format!("{command} is not possible now"));
        }
        match command {
            "query-migrate" => return Ok(self.status.clone()),
            "query-status" => return Ok(json!({ "status": self.state })),
            "query-migrate-capabilities" => {
                let rows = self
                    .capabilities
                    .iter()
                    .map(|(name, state)| json!({ "capability": name, "state": state }));
                return Ok(rows.collect());
            }
            "query-migrate-parameters" => return Ok(json!(self.parameters)),
            "query-block-exports" | "query-named-block-nodes" => return Ok(json!([])),
            "query-commands" => return Ok(json!([{ "name": "blockdev-set-active" }])),
            "qom-list" => {
                let object = |name| json!({ "name": name, "type": "child<throttle-group>" });
                return Ok(self.objects.iter().map(object).collect());
            }
            "migrate-set-capabilities" => {
                for row in arguments["capabilities"].as_array().expect("list") {
                    let name = row["capability"].as_str().expect("name").to_owned();
                    self.capabilities.insert(name, row["state"].as_bool().expect("state"));
                }
            }
            "migrate-set-parameters" => {
                self.parameters.extend(arguments.as_object().expect("object").clone())
            }
            "object-add" => self.objects.push(arguments["id"].as_str().expect("id").into()),
            "object-del" => self.objects.retain(|id| arguments["id"] != *id),
            "closefd" => return Err("no such descriptor".into()),
            "migrate_cancel" => self.status = json!({ "status": "cancelled" }),
            "cont" => self.state = "running",
            _ => {}
        }
        Ok(json!({}))
    }
}

/// A connection to a fake QEMU whose owner has set some things.
struct Scene {
    qmp: Qmp,
    fake: Arc<Mutex<Fake>>,
    journal: PathBuf,
    _directory: tempfile::TempDir,
}

impl Scene {
    async fn new() -> Self {
        let (qmp, peer, directory) = pair().await;
        let journal = directory.path().join("migration.json");
        let capabilities = [
            ("events", false),
            ("pause-before-switchover", false),
            ("background-snapshot", false),
            ("xbzrle", true),
        ];
        let fake = Fake {
            capabilities: capabilities.map(|(name, state)| (name.to_owned(), state)).into(),
            parameters: [
                ("max-bandwidth".to_owned(), json!(5)),
                ("downtime-limit".to_owned(), json!(300)),
            ]
            .into(),
            status: json!({ "status": "failed" }),
            state: "running",
            journal: journal.clone(),
            ..Fake::default()
        };
        let fake = Arc::new(Mutex::new(fake));
        tokio::spawn(serve(peer, fake.clone()));
        Self { qmp, fake, journal, _directory: directory }
    }

    fn with<T>(&self, act: impl FnOnce(&mut Fake) -> T) -> T {
        act(&mut self.fake.lock().expect("fake"))
    }

    fn settings(&self) -> (BTreeMap<String, bool>, BTreeMap<String, Value>, Vec<String>) {
        self.with(|fake| (fake.capabilities.clone(), fake.parameters.clone(), fake.objects.clone()))
    }

    fn heard(&self, command: &str) -> usize {
        self.with(|fake| fake.log.iter().filter(|heard| *heard == command).count())
    }

    async fn prepare(&self) -> Result<Migration, MigrationError> {
        Migration::prepare(&self.qmp, StreamMode::PreCopy, &StreamOptions::default(), &self.journal)
            .await
    }
}

async fn serve(mut peer: Peer, fake: Arc<Mutex<Fake>>) {
    while let Some((command, id)) = peer.command().await {
        let answer = fake
            .lock()
            .expect("fake")
            .answer(command["execute"].as_str().expect("name"), &command["arguments"]);
        match answer {
            Ok(value) => peer.answer(id, value).await,
            Err(why) => {
                peer.send(
                    &json!({"error": {"class": "GenericError", "desc": why}, "id": id}).to_string(),
                )
                .await
            }
        }
    }
}

#[tokio::test]
async fn the_journal_comes_before_the_first_change_and_goes_after_the_last() {
    let scene = Scene::new().await;
    let before = scene.settings();
    let migration = scene.prepare().await.expect("prepare");
    let (capabilities, parameters, objects) = scene.settings();
    assert_eq!(
        (capabilities["events"], capabilities["pause-before-switchover"], capabilities["xbzrle"]),
        (true, true, false)
    );
    assert!(parameters["max-bandwidth"].as_u64() > Some(1 << 40));
    assert_eq!(
        (&parameters["downtime-limit"], objects.as_slice()),
        (&json!(5), &[scene.qmp.names().name("migration")][..])
    );
    // A parameter that this QEMU does not list is not set.
    assert!(!parameters.contains_key("tls-creds"));
    migration.cancel().await.expect("cancel");
    assert_eq!(scene.settings(), before);
    assert!(!scene.journal.exists());
    assert_eq!(scene.with(|fake| fake.journaled.iter().filter(|there| !**there).count()), 0);
}

#[tokio::test]
async fn migration_settings_are_restored_after_a_refused_one() {
    for refused in ["migrate-set-capabilities", "migrate-set-parameters", "getfd"] {
        let scene = Scene::new().await;
        let before = scene.settings();
        scene.with(|fake| fake.refuse.push(refused));
        let error = scene.prepare().await.map(drop).expect_err("refused");
        assert!(error.to_string().contains(&format!("{refused} is not possible now")), "{error}");
        assert_eq!((scene.settings(), scene.journal.exists()), (before, false), "{refused}");
    }
}

#[tokio::test]
async fn migration_of_another_client_makes_prepare_fail_without_changes() {
    let scene = Scene::new().await;
    scene.with(|fake| fake.status = json!({ "status": "active" }));
    let error = scene.prepare().await.map(drop).expect_err("busy");
    assert!(error.to_string().contains("`active`") && error.is_retryable(), "{error}");
    assert!(matches!(probe(&scene.qmp).await, Err(MigrationError::Busy { .. })));
    assert_eq!((scene.with(|fake| fake.log.len()), scene.journal.exists()), (0, false));
}

#[tokio::test]
async fn a_vm_that_cannot_be_migrated_says_why() {
    let scene = Scene::new().await;
    scene.with(|fake| fake.status = json!({ "blocked-reasons": ["the VFIO device does"] }));
    let support = probe(&scene.qmp).await.expect("probe");
    assert_eq!(
        (&support.pre_copy, support.preferred()),
        (&Err("the VFIO device does".into()), None)
    );
    let error = scene.prepare().await.map(drop).expect_err("blocked");
    assert!(error.to_string().contains("the VFIO device does"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_session_has_cancelled_when_the_drop_returns() {
    let scene = Scene::new().await;
    let before = scene.settings();
    let mut migration = scene.prepare().await.expect("prepare");
    scene.with(|fake| fake.status = json!({ "status": "active" }));
    migration.start().await.expect("start");
    drop(migration);
    assert_eq!(scene.heard("migrate_cancel"), 1);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while scene.settings() != before || scene.journal.exists() {
        assert!(std::time::Instant::now() < deadline, "{:?}", scene.settings());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migration_failure_has_the_reason_that_qemu_gives() {
    let scene = Scene::new().await;
    let mut migration = scene.prepare().await.expect("prepare");
    migration.start().await.expect("start");
    scene
        .with(|fake| fake.status = json!({ "status": "failed", "error-desc": "the cable is out" }));
    let error = migration.switchover().await.map(drop).expect_err("failed");
    assert!(
        matches!(&error, MigrationError::Failed { .. })
            && error.to_string().contains("the cable is out"),
        "{error}"
    );
    // The guard of the pause that might have begun was dropped.
    assert_eq!((scene.heard("migrate_cancel"), scene.heard("cont")), (1, 1));
    migration.cancel().await.expect("cancel");
}

#[tokio::test]
async fn calls_out_of_order_are_refused() {
    let scene = Scene::new().await;
    let mut migration = scene.prepare().await.expect("prepare");
    migration.take_reader().expect("reader");
    assert!(matches!(migration.take_reader(), Err(MigrationError::Order(_))));
    assert!(matches!(migration.switchover().await.map(drop), Err(MigrationError::Order(_))));
    let paused = Paused::stop(&scene.qmp).await.expect("stop");
    assert!(matches!(migration.complete(&paused).await, Err(MigrationError::Order(_))));
    assert!(matches!(migration.memory_is_held(paused).await, Err(MigrationError::Order(_))));
    assert!(matches!(migration.finish().await, Err(MigrationError::Order(_))));
    assert!(!scene.journal.exists());
}

/// A journal of a helper that has ended, whose settings are (not) there any more.
async fn abandoned(
    status: &'static str,
    state: &'static str,
) -> (Scene, impl Fn() -> (usize, usize)) {
    let scene = Scene::new().await;
    let mut migration = scene.prepare().await.expect("prepare");
    migration.start().await.expect("start");
    #[expect(clippy::disallowed_methods, reason = "a helper that is killed drops nothing")]
    std::mem::forget(migration);
    scene.with(|fake| {
        (fake.status, fake.state) = (json!({ "status": status }), state);
        fake.log.clear();
    });
    let fake = scene.fake.clone();
    let heard = move || {
        let fake = fake.lock().expect("fake");
        let count = |command: &str| fake.log.iter().filter(|heard| *heard == command).count();
        (count("migrate_cancel"), count("cont"))
    };
    (scene, heard)
}

#[tokio::test]
async fn recovery_resumes_a_guest_that_stands_after_our_migration() {
    let (scene, heard) = abandoned("completed", "postmigrate").await;
    let recovered = recover(&scene.qmp, &scene.journal).await.expect("recover");
    assert_eq!(
        (recovered, heard()),
        (Recovered { found: true, cancelled: false, resumed: true }, (0, 1))
    );
    assert_eq!(scene.settings().1["max-bandwidth"], json!(5));
    assert!(scene.settings().2.is_empty() && !scene.journal.exists());
    assert_eq!(recover(&scene.qmp, &scene.journal).await.expect("again"), Recovered::default());
}

/// It may run on another host.
#[tokio::test]
async fn recovery_leaves_a_guest_that_was_migrated_since() {
    let (scene, heard) = abandoned("completed", "postmigrate").await;
    scene.with(|fake| fake.parameters.insert("max-bandwidth".into(), json!(77)));
    let recovered = recover(&scene.qmp, &scene.journal).await.expect("recover");
    assert_eq!((recovered.resumed, heard()), (false, (0, 0)));
    assert_eq!(scene.settings().1["max-bandwidth"], json!(77), "the owner's");
}

#[tokio::test]
async fn recovery_leaves_a_migration_of_another_client_alone() {
    let (scene, heard) = abandoned("active", "running").await;
    scene.with(|fake| fake.parameters.insert("max-bandwidth".into(), json!(77)));
    assert!(matches!(recover(&scene.qmp, &scene.journal).await, Err(MigrationError::Busy { .. })));
    assert_eq!((heard(), scene.journal.exists()), ((0, 0), true));
}

#[tokio::test]
async fn a_journal_of_another_qemu_changes_nothing() {
    let (scene, heard) = abandoned("completed", "postmigrate").await;
    scene.with(|fake| fake.objects.clear());
    let before = scene.settings();
    assert!(!recover(&scene.qmp, &scene.journal).await.expect("recover").resumed);
    assert_eq!((scene.settings(), heard(), scene.journal.exists()), (before, (0, 0), false));
}
