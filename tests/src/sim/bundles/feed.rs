//! How an agent reads the journal of a bundle and what it makes of it: uploads, and reports in the journal's order. The
//! part of the driver that `agent/src/bundles/feed.rs` is in the product.

use super::*;

impl World {
    pub(super) fn start_feed(&mut self, index: usize, bundle: BundleRef) {
        let token = self.next_serial();
        let Some(bundles) = self.bundles_of(index) else {
            return;
        };
        let recorded = bundles.lanes.on_record(bundle);
        let (Some(growth), Some(recorded)) = (bundles.growth.get(&bundle).copied(), recorded)
        else {
            return;
        };
        let feed = Feed {
            token,
            growth,
            recorded,
            offset: 0,
            number: 0,
            pending: VecDeque::new(),
            message: None,
        };
        bundles.feeds.insert(bundle, feed);
        let wait = self.rng.skewed(100, ms(5));
        self.bundle_step(wait, index, bundle, BundleStep::Feed(token));
    }

    pub(super) fn feed_reads(&mut self, index: usize, bundle: BundleRef, token: u64) {
        let host = &mut self.hosts[index];
        let (Some(agent), Some(dir)) = (&mut host.agent, host.disk.bundles.get(&bundle)) else {
            return;
        };
        let feeds = &mut agent.bundles.feeds;
        let Some(feed) = feeds.get_mut(&bundle).filter(|feed| feed.token == token) else {
            return;
        };
        let upto = feed.growth.journal.min(dir.journal.len());
        let mut uploads = Vec::new();
        for entry in dir.journal.iter().take(upto).skip(feed.offset) {
            let number = feed.number;
            feed.number += u64::from(entry.is_report());
            let report = match entry {
                Entry::Handed(_) | Entry::Began(_) => continue,
                Entry::Skipped { to } => {
                    feed.number = feed.number.max(*to);
                    continue;
                }
                Entry::Over { message } => {
                    feed.message = Some(message.clone());
                    continue;
                }
                Entry::Returned(range) => TaskReport::Returned(*range),
                Entry::Started { task, at } => TaskReport::Started {
                    task: *task,
                    at: *at,
                },
                Entry::Ended(end) => TaskReport::Ended {
                    task: end.task,
                    started_at: end.started_at,
                    ending: Box::new(ending(end, None)),
                },
            };
            if number < feed.recorded {
                continue;
            }
            let waits = matches!(entry, Entry::Ended(end) if end.left);
            feed.pending.push_back((number, report, waits));
            if waits {
                uploads.push(number);
            }
        }
        feed.offset = feed.offset.max(upto);
        for number in uploads {
            let wait = self.rng.skewed(ms(10), secs(5));
            let feed = token;
            self.bundle_step(wait, index, bundle, BundleStep::Uploaded { feed, number });
        }
        self.hand_over(index, bundle);
    }

    pub(super) fn uploaded(&mut self, index: usize, bundle: BundleRef, token: u64, number: u64) {
        if !self.reaches(index) || self.goes_wrong(self.swarm.chances.upload_fails) {
            self.see("upload of a task in a bundle failed");
            let wait = self.rng.skewed(ms(100), secs(20));
            let feed = token;
            return self.bundle_step(wait, index, bundle, BundleStep::Uploaded { feed, number });
        }
        let byte = u8::try_from(self.rng.below(250)).unwrap_or_default();
        let found = self.bundles_of(index).and_then(|bundles| {
            let feed = bundles.feeds.get_mut(&bundle)?;
            (feed.token == token).then_some(feed)
        });
        let Some(feed) = found else { return };
        let pending = feed.pending.iter_mut().find(|pending| pending.0 == number);
        if let Some((_, TaskReport::Ended { ending, .. }, waits)) = pending {
            ending.outputs = Some(Digest([byte; 32]));
            *waits = false;
        }
        self.hand_over(index, bundle);
    }

    /// Hands over what waits for nothing, in order, and the end behind it.
    pub(super) fn hand_over(&mut self, index: usize, bundle: BundleRef) {
        let Some(bundles) = self.bundles_of(index) else {
            return;
        };
        let Some(feed) = bundles.feeds.get_mut(&bundle) else {
            return;
        };
        while let Some((number, report, _)) = feed.pending.pop_front_if(|pending| !pending.2) {
            bundles.lanes.push(bundle, number, report);
        }
        let growth = feed.growth;
        let is_over = growth.over && feed.pending.is_empty() && feed.offset >= growth.journal;
        if let Some(message) = feed.message.clone().filter(|_| is_over) {
            let total = feed.number;
            let end = ObservedBundlePhase::Ended { total, message };
            bundles.lanes.set_phase(bundle, end);
        }
        self.pump(index);
    }

    // === restart ===
}
