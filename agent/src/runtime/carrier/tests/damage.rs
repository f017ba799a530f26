//! What a bundle's record or journal that cannot be read means for its tasks.

use super::*;

fn kill_carrier(world: &World) {
    let carrier = world.dir().shim().read_shim().unwrap().unwrap();
    let pid = nix::unistd::Pid::from_raw(carrier.pid);
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
}

/// Flips a bit of the first line that holds `text`; where the line begins.
fn damage_line(path: &Path, text: &str) -> usize {
    let mut bytes = std::fs::read(path).unwrap();
    let at = bytes
        .windows(text.len())
        .position(|window| window == text.as_bytes())
        .unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, &bytes).unwrap();
    bytes[..at]
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |end| end + 1)
}

/// Tasks 0 and 1 end, and 2 and 3 go on.
async fn half_done(world: &mut World) {
    let script = "[ $YARD_TASK_INDEX -lt 2 ] && exit $YARD_TASK_INDEX; exec sleep 100000";
    world.start(sh(script), &[range(0, 5)]).await;
    world
        .recorded(|records| has_begun(3)(records) && ends(records).len() == 2)
        .await;
}

fn all_records(world: &World) -> Vec<Record> {
    let bytes = std::fs::read(world.dir().journal()).unwrap();
    let (items, taken) = items(&bytes, 0);
    assert_eq!(taken, bytes.len());
    let records = items.into_iter().filter_map(|item| match item {
        Item::Record(record) => Some(record),
        Item::Gap(_) => None,
    });
    records.collect()
}

#[tokio::test]
async fn what_a_damaged_journal_may_have_told_is_unknown_and_the_rest_is_not_lost() {
    for text in [
        "handed",
        "\"began\":1",
        "ended\":{\"task\":0",
        "\"began\":3",
    ] {
        let mut world = World::new();
        half_done(&mut world).await;
        world.restart();
        kill_carrier(&world);
        until(|| world.dir().shim().is_unlocked().unwrap()).await;
        let last = std::fs::read_to_string(world.dir().journal()).unwrap();
        let last = last.lines().last().unwrap().to_owned();
        let offset = damage_line(&world.dir().journal(), text);
        let is_torn = last.contains(text);
        world.carriers.recover().await.unwrap();
        world.hand(range(0, 5));
        while !world.told.1 {
            world.next().await;
        }
        let records = all_records(&world);
        let ends = ends(&records);
        let given_back = returned(&records);
        // Each task has one end, and none that ran is given to another.
        for task in 0..6 {
            let counted = usize::from(ends.contains_key(&task))
                + usize::from(given_back.contains(TaskIndex(task)));
            assert_eq!(counted, 1, "{text}: {task} in {records:?}");
        }
        assert!(is_torn || given_back.is_empty(), "{text}: {records:?}");
        assert!(
            !(0..3).any(|task| given_back.contains(TaskIndex(task))),
            "{text}"
        );
        let said = format!(
            "record unreadable: {}: byte {offset}",
            world.dir().journal().display()
        );
        let unknown = ends.values().filter(|end| end.message == said);
        assert!(is_torn || unknown.count() >= 3, "{text}: {records:?}");
        let known = ends[&1].exit == Some(ExitStatus::Code(1));
        assert!(known, "{text}: {records:?}");
        assert!(world.survivors().is_empty());
    }
}

#[tokio::test]
async fn reports_on_record_that_the_journal_lost_are_not_numbered_again() {
    let mut world = World::new();
    half_done(&mut world).await;
    world.restart();
    kill_carrier(&world);
    until(|| world.dir().shim().is_unlocked().unwrap()).await;
    // All from the first end on is gone; the coordinator has both on record.
    let journal = std::fs::read(world.dir().journal()).unwrap();
    let text = String::from_utf8(journal.clone()).unwrap();
    let kept = text.find("\"ended\"").unwrap();
    let kept = text[..kept].rfind('\n').unwrap() + 20;
    std::fs::write(world.dir().journal(), &journal[..kept]).unwrap();
    world.carriers.recover().await.unwrap();
    world.desired.recorded = 2;
    world.desired.tasks = [range(2, 5)].into_iter().collect();
    world.carriers.direct(&world.desired.clone());
    let records = world.over().await;
    assert!(records.contains(&Record::Skipped { to: 2 }), "{records:?}");
    let ends = ends(&records);
    assert!(
        !ends.contains_key(&0) && !ends.contains_key(&1),
        "{records:?}"
    );
}

#[tokio::test]
async fn a_bundle_without_its_record_is_known_from_its_carrier() {
    for dead in [false, true] {
        let mut world = World::new();
        half_done(&mut world).await;
        damage_line(&world.dir().file(), "return_after");
        world.restart();
        if dead {
            kill_carrier(&world);
            until(|| world.dir().shim().is_unlocked().unwrap()).await;
        }
        let found = world.carriers.recover().await.unwrap();
        assert_eq!(found[0].carrier, RecoveredCarrier::Started);
        assert_eq!(found[0].spec.command[0], "/bin/sh");
        world.stop(Duration::ZERO);
        let records = world.over().await;
        let ends = ends(&records);
        assert_eq!(ends.len(), 4);
        let cause = match dead {
            true => EndCause::SupervisorLost,
            false => EndCause::Stopped,
        };
        assert_eq!((ends[&2].cause, ends[&3].cause), (cause, cause));
        let marks = processes::Marks::new(&settle::read_record(&world.dir()).unwrap().key);
        assert!(marks.all().is_empty());
    }
}

#[tokio::test]
async fn a_bundle_of_which_nothing_can_be_read_is_unknown() {
    let mut world = World::new();
    half_done(&mut world).await;
    let key = settle::read_file(&world.dir()).unwrap().key;
    world.restart();
    kill_carrier(&world);
    until(|| world.dir().shim().is_unlocked().unwrap()).await;
    damage_line(&world.dir().file(), "return_after");
    damage_line(&world.dir().shim().shim(), "start_time");
    assert!(world.carriers.recover().await.unwrap().is_empty());
    world.hand(range(0, 5));
    let records = world.over().await;
    let unknown = ends(&records).into_values();
    let unknown = unknown.filter(|end| end.message.contains("bundle.json: record unreadable"));
    assert_eq!(unknown.count(), 4, "{records:?}");
    let marks = processes::Marks::new(&key);
    marks
        .all()
        .iter()
        .for_each(|process| process.signal(Signal::SIGKILL));
}
