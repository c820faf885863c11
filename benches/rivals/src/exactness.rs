//! Streams made by hand whose answers are known: holes, copies, opaque engine keys.

use kv_indexer::model::CountMode;

use crate::{
    chain::ChainRaw,
    contender::{Contender, Event, Place, Writer},
    crtc::Crtc,
    ours::Ours,
    stream::{Prompt, Random},
};

/// Depths of pods 0 and 1.
type Depths = (u32, u32);

/// A stream, what is asked after it, and the true answer by set semantics and by counted copies.
struct Probe {
    what: &'static str,
    events: Vec<Event>,
    asked: Prompt,
    set: Depths,
    counted: Depths,
}

fn probes() -> Vec<Probe> {
    let mut random = Random(53);
    let gpu = Place::Gpu;
    let long = Prompt::new(&mut random, 8);
    let other = long.diverging(&mut random, 4, 8);
    let ten = Prompt::new(&mut random, 10);
    let four = Prompt::new(&mut random, 4);
    let opaque = Prompt::new(&mut random, 64);
    let two =
        vec![long.stored(0, gpu, 0..8), other.stored(1, gpu, 0..8), long.removed(0, gpu, 0..1)];
    let hole = vec![ten.stored(0, gpu, 0..10), ten.removed(0, gpu, 5..6)];
    let back = |events: &[Event], event: Event| [events, &[event]].concat();
    let copies =
        vec![four.stored(0, gpu, 0..4), four.stored(0, gpu, 0..4), four.removed(0, gpu, 3..4)];
    let one = |depth| ((depth, 0), (depth, 0));
    let probe = |what, events, asked: &Prompt, (set, counted)| Probe {
        what,
        events,
        asked: asked.clone(),
        set,
        counted,
    };
    let both = |depths: Depths| (depths, depths);
    vec![
        probe("A holds 8, B 4 of them; A's head evicted", two.clone(), &long, both((0, 4))),
        probe("... and stored again", back(&two, long.stored(0, gpu, 0..1)), &long, both((8, 4))),
        probe("10 blocks, block 5 evicted", hole.clone(), &ten, one(5)),
        probe("... and stored again", back(&hole, ten.stored(0, gpu, 5..6)), &ten, one(10)),
        probe("4 blocks stored twice, tail evicted once", copies, &four, ((3, 0), (4, 0))),
        probe(
            "opaque engine keys, other ones on B: 64, 40",
            vec![opaque.stored(0, gpu, 0..64), opaque.renamed(9).stored(1, gpu, 0..40)],
            &opaque,
            both((64, 40)),
        ),
    ]
}

fn answer<C: Contender>(index: &C, probe: &Probe) -> Depths {
    let mut writer = index.writer();
    probe.events.iter().for_each(|event| writer.apply(C::prepare(event)));
    writer.flush();
    let mut found = C::Answer::default();
    index.lookup(&C::query(&probe.asked.tokens), &mut found);
    let depths = C::depths(&found);
    let of = |pod| depths.iter().find(|(its, _)| *its == pod).map_or(0, |(_, depth)| *depth);
    (of(0), of(1))
}

/// The table; and whether our own answers are all true.
pub(crate) fn table() -> (String, bool) {
    let mut out = format!(
        "{:<46}{:>10}{:>14}{:>16}{:>16}{:>14}\n",
        "stream (answer: A, B)", "truth", "ours, set", "ours, counted", "kv-index", "dynamo CRTC"
    );
    let mut right = true;
    for probe in probes() {
        let set = answer(&Ours::counting(2, CountMode::Set), &probe);
        let counted = answer(&Ours::counting(2, CountMode::Counted), &probe);
        right &= set == probe.set && counted == probe.counted;
        let cell = |depths: Depths, truth: Depths| {
            let mark = if depths == truth { "" } else { "!" };
            format!("{mark}{}, {}", depths.0, depths.1)
        };
        out += &format!(
            "{:<46}{:>10}{:>14}{:>16}{:>16}{:>14}\n",
            probe.what,
            cell(probe.set, probe.set),
            cell(set, probe.set),
            cell(counted, probe.counted),
            cell(answer(&ChainRaw::new(2), &probe), probe.set),
            cell(answer(&Crtc::new(2), &probe), probe.set),
        );
    }
    out += "! differs from the truth; where engines announce every copy, the truth of the fifth is 4.\n";
    (out, right)
}
