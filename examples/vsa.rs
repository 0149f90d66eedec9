//! Vectors that stand for symbols: records in one vector, and an analogy read out of two of them
//! ("What is the dollar of Mexico?", Kanerva, 2010); then the language of a sentence, told by its
//! letter trigrams (Joshi, Halseth and Kanerva, 2016).
//!
//!     cargo run --release --example vsa

use firebrick_kernels::vsa::{Bundle, Hypervector, Seed};

/// Elements of every vector.
const LEN: usize = 10_000;

fn main() {
    for (question, answer, similarity) in analogies() {
        println!("{question}: {answer} (similarity {similarity:.2})");
    }
    for (sentence, language, similarities) in languages() {
        let all: Vec<String> = similarities.iter().map(|s| format!("{s:.2}")).collect();
        println!("{language}: {sentence:?} (similarities {})", all.join(", "));
    }
}

/// The vector of a name. It is random, but the same in every run.
fn symbol(name: &str) -> Hypervector {
    Hypervector::bipolar(LEN, Seed::new(2026).with_name(name))
}

/// Returns the name whose vector is most similar to `vector`, and the similarity.
fn closest<'a>(vector: &Hypervector, names: &[&'a str]) -> (&'a str, f64) {
    let similarities = names
        .iter()
        .map(|name| (*name, symbol(name).similarity(vector)));
    similarities
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap_or(("", 0.0))
}

/// Makes one vector of a country: binds each field to its value and adds up the results.
fn country(name: &str, capital: &str, currency: &str) -> Hypervector {
    let fields = [("name", name), ("capital", capital), ("currency", currency)];
    let bound = fields.map(|(field, value)| symbol(field).bind(&symbol(value)));
    Bundle::of(LEN, &bound).majority()
}

/// Asks questions about two records. Returns each question with its answer and the similarity.
pub fn analogies() -> Vec<(&'static str, &'static str, f64)> {
    const VALUES: [&str; 6] = [
        "Mexico",
        "Mexico City",
        "peso",
        "USA",
        "Washington",
        "dollar",
    ];
    let mexico = country("Mexico", "Mexico City", "peso");
    let usa = country("USA", "Washington", "dollar");
    // What turns one record into the other: every value of the one, bound to that of the other.
    let mapping = mexico.bind(&usa);
    let ask = |vector: Hypervector| closest(&vector, &VALUES);
    [
        (
            "the capital of Mexico",
            ask(mexico.unbind(&symbol("capital"))),
        ),
        (
            "the currency of the USA",
            ask(usa.unbind(&symbol("currency"))),
        ),
        (
            "the dollar of Mexico",
            ask(mapping.unbind(&symbol("dollar"))),
        ),
        (
            "the Mexico City of the USA",
            ask(mapping.unbind(&symbol("Mexico City"))),
        ),
    ]
    .map(|(question, (answer, similarity))| (question, answer, similarity))
    .into()
}

/// Adds up the trigrams of a text. In each of them the first letter is rotated by two places and
/// the second by one, so that the order of letters counts.
fn profile(text: &str) -> Hypervector {
    let letters: Vec<char> = text.to_lowercase().chars().collect();
    let mut bundle = Bundle::new(LEN);
    for trigram in letters.windows(3) {
        let [first, second, third] = [0, 1, 2].map(|i| symbol(&trigram[i].to_string()));
        bundle.add(&first.permute(2).bind(&second.permute(1)).bind(&third));
    }
    bundle.majority()
}

/// Tells the language of three sentences. Returns each sentence with its language and its
/// similarity to each language.
pub fn languages() -> Vec<(&'static str, &'static str, Vec<f64>)> {
    const KNOWN: [(&str, &str); 3] = [
        (
            "English",
            "the house stands at the end of the street, and when the evening comes the children \
             play in front of it until their mother calls them in for the night",
        ),
        (
            "German",
            "das haus steht am ende der strasse, und wenn der abend kommt, spielen die kinder \
             davor, bis ihre mutter sie hereinruft, weil es nacht geworden ist",
        ),
        (
            "Spanish",
            "la casa está al final de la plaza, y cuando llega la tarde los niños juegan delante \
             de ella hasta que su madre los llama porque ya es de noche",
        ),
    ];
    let profiles = KNOWN.map(|(_, text)| profile(text));
    let sentences = [
        "when will they come to the street again",
        "wann kommen die kinder wieder in das haus",
        "cuando juegan los niños en la plaza de noche",
    ];
    let told = sentences.map(|sentence| {
        let own = profile(sentence);
        let similarities: Vec<f64> = profiles.iter().map(|p| p.similarity(&own)).collect();
        let best = (0..KNOWN.len()).max_by(|a, b| similarities[*a].total_cmp(&similarities[*b]));
        let language = best.map_or("", |best| KNOWN[best].0);
        (sentence, language, similarities)
    });
    told.into()
}
