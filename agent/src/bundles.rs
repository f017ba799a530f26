//! Carries out what the core asks for bundles: directories, snapshots, carriers, and the reports of what became of their
//! tasks. Decides nothing about a bundle.

mod feed;
mod lanes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use trainyard_agent_core::{BundleEffect, BundleEvent, RecoveredBundle, RecoveredBundleState};
use trainyard_common::bundle::{DesiredBundle, ObservedBundlePhase, TaskReport, TaskSet};
use trainyard_common::ids::BundleRef;
use trainyard_common::member::{EndCause, Ending, MemberSpec, RankEnd};
use trainyard_common::state::ExitStatus;
use trainyard_common::time::Timestamp;
use trainyard_transport::task::{blocking, spawn};

use crate::chain::chain;
use crate::fetch::Fetcher;
use crate::runtime::carrier::{
    CarrierError, CarrierEvent, CarrierState, Carriers, RecoveredCarrier, missing,
};
use crate::runtime::footprint::give_back_heap;

pub(crate) use self::feed::Means;
pub(crate) use self::lanes::Lanes;

use self::feed::{Feed, Growth, Recorded};

/// When what a bundle needed in memory is surely free, so that it can be given back.
const TIDY_AFTER: Duration = Duration::from_secs(1);

/// The bundles, as far as they are not the core's business.
#[derive(Debug)]
pub(crate) struct Bundles {
    carriers: Carriers,
    events: mpsc::Receiver<CarrierEvent>,
    fetcher: Fetcher,
    means: Means,
    feeds: BTreeMap<BundleRef, Feed>,
    /// How far the journals are that are not read yet, as the coordinator has not said what it has on record.
    growth: BTreeMap<BundleRef, Growth>,
    /// Tasks whose ends the coordinator said last that it has not on record.
    open: BTreeMap<BundleRef, Arc<TaskSet>>,
    refused: BTreeMap<BundleRef, Refused>,
    fetches: BTreeMap<BundleRef, CancellationToken>,
    running: JoinSet<BundleEvent>,
}

/// A bundle that has no journal.
#[derive(Debug, Default)]
struct Refused {
    reported: TaskSet,
    /// The number of the next report.
    next: u64,
}

impl Bundles {
    pub(crate) fn new(
        carriers: Carriers,
        events: mpsc::Receiver<CarrierEvent>,
        fetcher: Fetcher,
        means: Means,
    ) -> Self {
        Self {
            carriers,
            events,
            fetcher,
            means,
            feeds: BTreeMap::new(),
            growth: BTreeMap::new(),
            open: BTreeMap::new(),
            refused: BTreeMap::new(),
            fetches: BTreeMap::new(),
            running: JoinSet::new(),
        }
    }

    /// Finds the bundles that earlier agent processes left.
    pub(crate) async fn recover(&mut self) -> Result<Vec<RecoveredBundle>, CarrierError> {
        let found = self.carriers.recover().await?;
        let bundles = found.into_iter().map(|found| {
            let (state, phase) = match found.carrier {
                RecoveredCarrier::None => {
                    (RecoveredBundleState::Accepted, ObservedBundlePhase::Preparing)
                }
                RecoveredCarrier::Started => {
                    (RecoveredBundleState::Carried, ObservedBundlePhase::Running)
                }
                RecoveredCarrier::Over { journal } => {
                    let over = true;
                    self.growth.insert(found.bundle, Growth { journal, over });
                    (RecoveredBundleState::Over, ObservedBundlePhase::Running)
                }
            };
            tracing::info!(bundle = %found.bundle, ?state, "found a bundle of an earlier agent process");
            let bundle = found.bundle;
            self.means.outgoing.bundles(|lanes| lanes.open(bundle, phase));
            RecoveredBundle {
                bundle,
                spec: found.spec,
                state,
            }
        });
        Ok(bundles.collect())
    }

    /// The next fact for the core; nothing if it was none of its business. Cancel-safe.
    ///
    /// # Errors
    /// A request panicked.
    pub(crate) async fn next(&mut self) -> Result<Option<BundleEvent>, JoinError> {
        tokio::select! {
            biased;
            // Cancel-safe: a result is taken whole or stays.
            Some(done) = self.running.join_next() => {
                let event = done?;
                if let BundleEvent::FetchFinished(bundle)
                | BundleEvent::FetchFailed { bundle, .. } = &event
                {
                    self.fetches.remove(bundle);
                }
                Ok(Some(event))
            }
            // Cancel-safe: an event is taken whole or stays. The sender lives as long as this.
            Some(event) = self.events.recv() => Ok(self.on_carrier(event)),
        }
    }

    fn on_carrier(&mut self, CarrierEvent { bundle, state }: CarrierEvent) -> Option<BundleEvent> {
        let (growth, event) = match state {
            CarrierState::Running { journal } => {
                let over = false;
                (Growth { journal, over }, BundleEvent::Running(bundle))
            }
            CarrierState::Over { journal } => {
                let over = true;
                (Growth { journal, over }, BundleEvent::Over(bundle))
            }
        };
        let before = self.growth.insert(bundle, growth);
        match self.feeds.get(&bundle) {
            Some(feed) => feed.grew(growth),
            None => self.start_feed(bundle),
        }
        // Of a carrier that runs, only the first word is news.
        match before {
            Some(_) if !growth.over => None,
            _ => {
                let running = ObservedBundlePhase::Running;
                if !growth.over {
                    self.means
                        .outgoing
                        .bundles(|lanes| lanes.set_phase(bundle, running));
                }
                Some(event)
            }
        }
    }

    /// Reads the journal from its beginning, once it is known what is on record.
    fn start_feed(&mut self, bundle: BundleRef) {
        let recorded = self.means.outgoing.bundles(|lanes| lanes.on_record(bundle));
        if let (Some(growth), Some(reports)) = (self.growth.get(&bundle), recorded) {
            let dir = self.carriers.dir(bundle);
            let open = self.open.get(&bundle).cloned().unwrap_or_default();
            let recorded = Recorded { reports, open };
            let feed = Feed::start(self.means.clone(), dir, *growth, recorded);
            self.feeds.insert(bundle, feed);
        }
    }

    pub(crate) fn carry_out(
        &mut self,
        effect: BundleEffect,
        spec: impl Fn(BundleRef) -> Option<MemberSpec>,
        now: Timestamp,
    ) {
        match effect {
            BundleEffect::Accept(desired) => self.accept(*desired),
            BundleEffect::Fetch(bundle) => {
                if let Some(spec) = spec(bundle) {
                    self.fetch(bundle, spec);
                }
            }
            BundleEffect::CancelFetch(bundle) => {
                if let Some(fetch) = self.fetches.get(&bundle) {
                    fetch.cancel();
                }
            }
            BundleEffect::Spawn(desired) => {
                self.note_record(&desired);
                if let Err(error) = self.carriers.spawn(&desired) {
                    let event = BundleEvent::SpawnFailed {
                        bundle: desired.bundle,
                        error: chain(&error),
                    };
                    self.running.spawn(async move { event });
                }
            }
            BundleEffect::Direct(desired) => {
                self.note_record(&desired);
                self.carriers.direct(&desired);
            }
            BundleEffect::End { desired, message } => {
                self.note_record(&desired);
                self.carriers.end(&desired, &message);
            }
            BundleEffect::Refuse {
                desired,
                message,
                may_have_run,
            } => self.refuse(&desired, message, may_have_run, now),
            BundleEffect::Drop(bundle) => self.forget(bundle),
            BundleEffect::Remove(bundle) => self.remove(bundle),
            BundleEffect::Note { bundle, text } => tracing::warn!(%bundle, "{text}"),
        }
    }

    fn accept(&mut self, desired: DesiredBundle) {
        let bundle = desired.bundle;
        let Some(spec) = desired.spec else {
            return;
        };
        let preparing = ObservedBundlePhase::Preparing;
        self.means.outgoing.bundles(|lanes| {
            lanes.open(bundle, preparing);
            lanes.recorded(bundle, desired.recorded)
        });
        let carriers = self.carriers.clone();
        self.running.spawn(async move {
            match carriers.accept(bundle, *spec).await {
                Ok(()) => BundleEvent::Accepted(bundle),
                Err(error) => BundleEvent::AcceptFailed {
                    bundle,
                    exists: matches!(error, CarrierError::AlreadyAccepted(_)),
                    error: chain(&error),
                },
            }
        });
    }

    fn fetch(&mut self, bundle: BundleRef, spec: MemberSpec) {
        let cancel = CancellationToken::new();
        self.fetches.insert(bundle, cancel.clone());
        let (fetcher, dir) = (self.fetcher.clone(), self.carriers.dir(bundle));
        self.running.spawn(async move {
            let template = dir.template();
            let made = blocking(move || dir.make_template()).await;
            let error = match made {
                Ok(()) => match fetcher.fetch(template, Box::new(spec), cancel).await {
                    Ok(()) => return BundleEvent::FetchFinished(bundle),
                    Err((error, _)) => error,
                },
                Err(error) => format!("cannot make the directory of the snapshot: {error}"),
            };
            BundleEvent::FetchFailed { bundle, error }
        });
    }

    /// What is on record need not be reported; in a new session all the rest is.
    fn note_record(&mut self, desired: &DesiredBundle) {
        let (bundle, recorded) = (desired.bundle, desired.recorded);
        let has_them = self
            .means
            .outgoing
            .bundles(|lanes| lanes.recorded(bundle, recorded));
        if !has_them {
            tracing::warn!(%bundle, recorded, "the coordinator has fewer reports on record than before");
            self.feeds.remove(&bundle);
        }
        let open = Arc::new(desired.tasks.clone());
        self.open.insert(bundle, open.clone());
        let reports = recorded;
        match self.feeds.get(&bundle) {
            Some(feed) => feed.recorded(Recorded { reports, open }),
            None => self.start_feed(bundle),
        }
    }

    fn refuse(
        &mut self,
        desired: &DesiredBundle,
        message: String,
        may_have_run: bool,
        now: Timestamp,
    ) {
        let bundle = desired.bundle;
        let refused = self.refused.entry(bundle).or_default();
        refused.next = refused.next.max(desired.recorded);
        let mut reports = Vec::new();
        for range in missing(&desired.tasks, &refused.reported) {
            refused.reported.insert(range);
            if may_have_run {
                reports.extend(range.tasks().map(|task| TaskReport::Ended {
                    task,
                    started_at: None,
                    ending: Box::new(unaccounted(&message, now)),
                }));
            } else {
                reports.push(TaskReport::Returned(range));
            }
        }
        self.means.outgoing.bundles(|lanes| {
            lanes.open(bundle, ObservedBundlePhase::Preparing);
            lanes.recorded(bundle, desired.recorded);
            for report in reports {
                lanes.push(bundle, refused.next, report);
                refused.next += 1;
            }
            let total = refused.next;
            lanes.set_phase(bundle, ObservedBundlePhase::Ended { total, message });
        });
    }

    fn remove(&mut self, bundle: BundleRef) {
        // Its journal is about to go.
        self.feeds.remove(&bundle);
        self.forget(bundle);
        let carriers = self.carriers.clone();
        self.running.spawn(async move {
            match carriers.remove(bundle).await {
                Ok(()) => {
                    spawn("heap", tidy_up());
                    BundleEvent::Removed(bundle)
                }
                Err(error) => BundleEvent::RemoveFailed {
                    bundle,
                    error: chain(&error),
                },
            }
        });
    }

    fn forget(&mut self, bundle: BundleRef) {
        self.refused.remove(&bundle);
        self.growth.remove(&bundle);
        self.open.remove(&bundle);
        self.means.outgoing.bundles(|lanes| lanes.close(bundle));
    }
}

/// Thousands of reports may have passed, and the next ones may be far away.
async fn tidy_up() {
    sleep(TIDY_AFTER).await;
    blocking(give_back_heap).await;
}

/// The end of a task that may have run here and of which nothing is known any more.
fn unaccounted(message: &str, now: Timestamp) -> Ending {
    Ending {
        cause: EndCause::SupervisorLost,
        message: message.to_owned(),
        started: true,
        ranks: vec![RankEnd {
            rank: 0,
            exit: ExitStatus::Unknown,
            at: now,
            unprompted: false,
            oom_killed: false,
        }],
        ended_at: now,
        outputs: None,
        checkpoint: None,
        warning: String::new(),
    }
}
