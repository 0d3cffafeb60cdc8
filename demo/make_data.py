"""Writes the posts and the dialogues that the demonstration trains and tests on, from a seeded grammar.

    python demo/make_data.py

The result is the same on every run: demo/data/posts_{train,test}.jsonl with "text" and "label" (ten classes,
named like newsgroups), and demo/data/dialogues_{train,test}.jsonl with "id", "dialogue" and "summary". No
text of a test file occurs in its train file. make_model.py pretrains on other texts of the same grammar.

In a template, [x|y] stands for one of its choices (which may be empty), and {slot} for a word of the text at
hand.
"""

import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "data"
SEED = 20
POSTS = {"train": 480, "test": 160}
DIALOGUES = {"train": 320, "test": 80}

# Every class shares words with a neighbour (lens, rope, plum ...), so that no single word gives a class away.
TOPICS = {
    "home.gardening": {
        "thing": "tomato bed|rose bush|compost heap|hedge|greenhouse|vegetable patch|plum tree|seed tray|"
        "herb pot|lawn|watering can|garden fork|bean row|flower bed",
        "act": "pruning the roses|digging in compost|sowing beans|mowing the lawn|planting bulbs|"
        "weeding the path|mulching the beds|trimming the hedge|raising seedlings|picking plums",
        "trouble": "the leaves turn yellow|slugs eat every seedling|the soil stays wet|the roots rot|"
        "moss takes over|the buds drop before they open|greenfly cover the stems|"
        "nothing sprouts in the shade|frost kills the shoots",
        "advice": "water early in the morning|add sand to the clay|cut back the old wood|"
        "cover the soil with straw|rotate the crops|feed the roots in spring|thin out the seedlings",
        "stuff": "clay soil|seed potatoes|mulch|fertilizer|roots|petals|weeds|rain barrels",
    },
    "sci.astronomy": {
        "thing": "telescope|star chart|eyepiece|mount|star cluster|double star|comet|nebula|observatory|"
        "galaxy|meteor shower|lunar crater|finder scope|solar filter",
        "act": "observing Saturn|counting meteors|hunting for comets|mapping craters|timing an eclipse|"
        "sketching Jupiter|tracking the moons|looking for faint galaxies|aligning the mount|"
        "splitting double stars",
        "trouble": "the image shakes at high power|street lamps drown the Milky Way|the mirror fogs up|"
        "the mount drifts off the star|clouds arrive with every eclipse|the planets look like blobs|"
        "the finder points somewhere else|dew settles on the lens|the rings of Saturn stay blurred",
        "advice": "let the mirror cool down|use a red torch|start with the Moon|"
        "drive away from the city lights|align on the pole star|wait for a steady night|pick a lower power",
        "stuff": "mirrors|orbits|constellations|light years|sunspots|dark skies|lenses|red giants",
    },
    "rec.cycling": {
        "thing": "road bike|saddle|rear wheel|chain|derailleur|touring bike|helmet|inner tube|handlebar|"
        "pannier|brake cable|bike pump|pedal|crank",
        "act": "climbing the long pass|commuting by bike|truing a wheel|riding in the rain|"
        "training for a tour|changing a tube|riding with the club|sprinting for the town sign|"
        "descending in fog|greasing the hubs",
        "trouble": "the chain skips under load|the spokes keep breaking|my knees hurt after an hour|"
        "the brakes squeal|the tyre goes flat every week|the gears will not shift|"
        "the saddle makes my legs numb|the hub rattles|cars pass far too close",
        "advice": "oil the chain|lower the saddle a little|carry two spare tubes|check the tyre pressure|"
        "shift before the hill|replace the cassette as well|ride at a steady pace",
        "stuff": "spokes|gears|tyres|bike lanes|chain oil|mileage|brake pads|steep climbs",
    },
    "home.cooking": {
        "thing": "frying pan|sourdough loaf|soup pot|lentil stew|pie crust|bread knife|oven dish|spice rack|"
        "pepper mill|cheese cake|onion tart|mixing bowl|gravy|risotto",
        "act": "kneading dough|roasting carrots|simmering the stock|frying onions|baking bread|making jam|"
        "seasoning the soup|whisking egg whites|pickling beans|rolling out pastry",
        "trouble": "the sauce splits|the crust burns and the middle stays raw|the dough will not rise|"
        "everything sticks to the pan|the rice turns to glue|the soup tastes of nothing|the cake sinks|"
        "the garlic goes bitter|the cream curdles",
        "advice": "salt the water|let the dough rest overnight|turn the heat down|add the butter at the end|"
        "toast the spices first|taste before you serve|use a heavy pan",
        "stuff": "butter|garlic|yeast|herbs|leftovers|recipes|plum jam|fresh beans",
    },
    "rec.photography": {
        "thing": "camera|zoom lens|tripod|flash|darkroom|roll of film|lens cap|portrait|light meter|negative|"
        "shutter|viewfinder|wide lens|print",
        "act": "shooting portraits|developing film|printing in the darkroom|photographing birds|"
        "waiting for soft light|scanning negatives|cleaning the sensor|taking pictures at night|"
        "framing a street scene|bracketing the exposure",
        "trouble": "the pictures come out too dark|the focus hunts|the faces look green|"
        "the negatives are scratched|the flash fires too late|there is dust on the sensor|"
        "the sky turns white|the shutter sticks in the cold|every shot is blurred",
        "advice": "open the aperture|use a longer exposure|put the camera on a tripod|"
        "get closer to the subject|meter for the shadows|shoot in the evening light|wipe the lens",
        "stuff": "apertures|contrast|film grain|shadows|lenses|colour prints|exposure times|prints",
    },
    "comp.hardware": {
        "thing": "graphics card|hard disk|power supply|keyboard|mainboard|memory module|monitor|laptop|"
        "network card|printer|processor|cooling fan|disk controller|modem",
        "act": "swapping the mainboard|adding memory|installing a driver|overclocking|cloning a disk|"
        "replacing the fan|building a computer from parts|updating the firmware|running memory tests|"
        "soldering a connector",
        "trouble": "the machine hangs at boot|the fan rattles|the screen stays black|the disk clicks|"
        "the driver crashes|the memory test fails|the printer port is dead|the power light blinks|"
        "the clock loses an hour a day",
        "advice": "check the jumpers|reseat the cards|update the driver|try another cable|blow the dust out|"
        "measure the voltage|make a backup first",
        "stuff": "drivers|sockets|cables|benchmarks|jumpers|voltage|chips|disk space",
    },
    "sci.weather": {
        "thing": "barometer|rain gauge|cold front|thunderstorm|weather station|forecast|storm cloud|"
        "heat wave|fog bank|wind vane|hail storm|radar image|pressure chart|dry spell",
        "act": "measuring rainfall|watching the barometer|chasing storms|reading pressure charts|"
        "logging temperatures|comparing forecasts|studying clouds|recording wind speeds|"
        "averaging old records|waiting for the first snow",
        "trouble": "the forecast misses every storm|the gauge overflows|the pressure drops without any wind|"
        "fog hides the valley for days|the thermometer reads too high|the frost comes in May|"
        "clouds build up but no rain falls|the radar shows nothing|the averages disagree",
        "advice": "put the thermometer in the shade|read the gauge at the same hour|look at the upper winds|"
        "trust the barometer|compare two models|write every value down|watch the high clouds",
        "stuff": "pressure|humidity|drizzle|upper winds|rainfall|frost|isobars|gusts",
    },
    "rec.sailing": {
        "thing": "mainsail|anchor|dinghy|keel|rudder|spinnaker|mooring line|mast|compass|life jacket|"
        "halyard|jib|harbour berth|tiller",
        "act": "reefing the sail|sailing against the tide|racing dinghies|anchoring in a bay|"
        "varnishing the deck|crossing the channel|tying up in the harbour|learning knots|sailing at night|"
        "scrubbing the hull",
        "trouble": "the anchor drags|the hull leaks|the boat heels too much|the halyard jams|"
        "the rudder vibrates|the sail flaps in every gust|the crew gets seasick|the compass is off|"
        "the rope chafes through",
        "advice": "reef early|check the tide tables|let out the sheet|keep the weight low|use a longer chain|"
        "wear a life jacket|rinse the ropes with fresh water",
        "stuff": "tides|ropes|gusts|knots|charts|varnish|waves|harbour fees",
    },
    "misc.pets": {
        "thing": "puppy|kitten|rabbit hutch|parrot|fish tank|hamster|dog lead|litter box|guinea pig|old cat|"
        "terrier|budgie|dog basket|tortoise",
        "act": "walking the dog|brushing the cat|training the puppy|cleaning the fish tank|"
        "feeding the rabbits|teaching the parrot words|clipping claws|visiting the vet|"
        "looking after two kittens|playing with the terrier",
        "trouble": "the cat scratches the sofa|the puppy chews my shoes|the parrot screams at dawn|"
        "the dog pulls the lead|the rabbit will not eat|the fish hide all day|the kitten bites|"
        "the hamster escapes|the old dog limps",
        "advice": "ask the vet|give smaller meals|reward every success|buy a bigger cage|"
        "change the water weekly|keep the food dry|walk an hour a day",
        "stuff": "fur|cat food|fleas|vet bills|biscuits|paws|straw|whiskers",
    },
    "rec.music": {
        "thing": "guitar|violin|piano|drum kit|amplifier|string quartet|choir|trumpet|record player|"
        "song book|bass line|old record|flute|concert",
        "act": "practising scales|tuning the guitar|playing in a band|singing in a choir|learning the violin|"
        "writing songs|reading notes|recording a demo|playing by ear|collecting records",
        "trouble": "the strings buzz|the amplifier hums|the drummer speeds up|my fingers hurt|"
        "the piano goes out of tune|the high notes crack|the band cannot keep time|the neighbours complain|"
        "the needle jumps",
        "advice": "use a metronome|change the strings|play it slowly first|warm up your voice|"
        "listen to the bass|practise ten minutes a day|count aloud",
        "stuff": "chords|rhythm|old records|strings|melodies|lyrics|harmony|sheet music",
    },
}

# The middle of a post: sentences about its topic.
TOPICAL = [
    (
        "[Does anybody know|Can someone tell me|I wonder|Nobody could tell me] why {trouble}[ all the time||"
        "][?|.]"
    ),
    (
        "After [two|three|six|ten] [weeks|months|years] of {act} I [still learn|am none the wiser|feel like "
        "a beginner]."
    ),
    "My {kin} [gave|sold|lent] me a {thing}, and [since then|now] {trouble}.",
    "[If|Whenever] {trouble}, [it helps to|you should|I would] {advice}.",
    (
        "I [always|never used to|was told to] {advice}, and [it works|it made no difference|that was the "
        "whole secret]."
    ),
    "[Last|One] [spring|summer|weekend|Sunday|winter] I spent [a whole day|hours|an evening] {act}.",
    (
        "The {thing} [I bought|from the shop|we have at home] is [not worth the money|better than I hoped|a "
        "bit too old]."
    ),
    (
        "[Good|Cheap|Better] {stuff} would [be a start|help me more than a new {thing}|cost less than a "
        "{thing}]."
    ),
    "[There is|I find] nothing [better|more relaxing] than {act}[ after work| on a Sunday|].",
    "[People|Books|Beginners] say a lot about {stuff}, but [hardly anything|too little] about {act}.",
    "Is a [second-hand|cheap|bigger] {thing} [good enough|any use] for {act}?",
    "[Thanks to|Without] the {thing} I would [never|hardly] have thought of {act}.",
    "[First|At first] {trouble}, then {trouble2}.",
    "[Please|Do not forget:|My rule:] {advice}, [then|and only then] {advice2}.",
    (
        "[When it comes to|As for] {stuff}, [opinions differ|I trust my {kin}|everybody has a rule of their "
        "own]."
    ),
]

# Sentences that occur in every class.
SHARED = [
    "[Any advice is welcome.|Any help would be great.|Is there any help for a beginner?]",
    "[Sorry|Excuse me] if this has been [asked|discussed] before.",
    "[I am new here,|New to this group,] so [be kind.|bear with me.|please correct me.]",
    "[That is|This is] only my [opinion|experience], of course.",
    "[What do you think?|Am I the only one?|Has anyone else seen this?|Who has tried it?]",
    "[Thanks|Many thanks] [in advance.|for reading.|for all the answers last time.]",
    "I [read|searched] [the old posts|two books about it] and [found nothing.|am more confused than before.]",
    "[My|The] [neighbour|boss|sister] [laughs at|does not understand] [me.|this hobby.|my plans.]",
    (
        "[Money|Time] is [tight|short] [this year|at the moment], [so it must be cheap.|so I have to choose "
        "well.]"
    ),
    "[I disagree with|You are right about] [what was said above.|the last post.]",
    "[It|The whole thing] took [longer|more patience] than I [thought.|had planned.]",
    (
        "[Well,|Anyway,|In short,] [I will not give up.|I am happy with it.|you live and learn.|that is how "
        "it goes.]"
    ),
    "[Greetings from the north.|Have a nice weekend, all.|Best wishes from a rainy village.]",
    "[I will report back|More about this] [next week.|when I know more.|after the holidays.]",
]

# A word of another class, so that the right one has to outweigh it.
ASIDES = [
    "My {kin} would rather [talk|hear] about {act}, but [that is another story|never mind].",
    "[Before that|Years ago] I was [more into|all about] {act}.",
    "It [costs|weighs] [as much as|less than|more than] a {thing}.",
    "[Yes, I know|I know], elsewhere they only [care about|argue about] {stuff}.",
]
KIN = (
    "brother|uncle|aunt|neighbour|father|mother|friend|wife|husband|colleague|grandfather|cousin|son|daughter"
)

NAMES = (
    "Anna|Tom|Lena|Mark|Sofia|Paul|Nina|Oscar|Julia|David|Clara|Felix|Emma|Jonas|Maria|Simon|Laura|Peter|"
    "Alice|Henry|Vera|Lucas|Ella|Martin|Ruth|Victor|Irene|Hugo|Carla|Leo|Marta|Erik|Helen|Adam|Rosa|Noah|"
    "Greta|Ivan|Diana|Samuel|Olga|Philip|Kate|Robert|Elsa|George|Linda|Max|Amira|Yusuf|Mei|Ravi|Chloe|Omar|"
    "Ines|Pedro|Sara|Ben|Zoe|Karl"
)
SLOTS = {
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "time": "noon|1|2|3|4|5|6|7|8|9|10|11|2:30|3:30|4:30|5:30|6:30|7:30|8:30|9:30",
    "place": "the station|the town hall|the old bridge|the library|the harbour|the main gate|the bus stop|"
    "the bakery|the market|the school|the fountain|the museum|the lake|the gym|the bookshop|the church|"
    "the pharmacy|the cinema|the tram stop|the post office|the pizzeria|the castle|the playground|the kiosk|"
    "the hospital|the theatre|Cafe Luna|Cafe Roma|the zoo|the ferry|the tea house|the hotel",
    "do": "go swimming|play chess|watch the new film|see the exhibition|practise the duet|"
    "study for the exam|have lunch|go for a run|play badminton|rehearse the play|fly the kite|plan the trip|"
    "visit the flea market|try the new cafe|listen to the band|go dancing|feed the ducks|play table tennis|"
    "look at the old maps|eat ice cream|collect chestnuts|learn the song|go rowing|have breakfast",
    "item": "drill|tent|ladder|sleeping bag|suitcase|camera|sewing machine|bike pump|projector|guitar|"
    "cake tin|tripod|rucksack|torch|hammock|dictionary|saw|toolbox|juicer|chess set|microphone|trailer|"
    "wheelbarrow|raincoat",
    "food": "milk|bread|eggs|rice|apples|butter|onions|coffee|cheese|tea|sugar|flour|yoghurt|lemons|noodles|"
    "carrots|honey|olives|salt|bananas|mushrooms|grapes",
    "reason": "a dentist appointment|a cold|a late shift|visitors from abroad|a headache|a deadline at work|"
    "a leaking pipe|a driving lesson|choir practice|a sore throat|a meeting|a sick child",
    "gift": "scarf|vase|puzzle|teapot|board game|cookbook|fountain pen|blanket|bird feeder|necklace|lamp|"
    "poster|wallet|plant|photo album|wine glass",
    "chore": "paint the fence|move the sofa|set up the printer|mow the lawn|clean the garage|hang the lamps|"
    "fix the tap|carry the boxes|build the wardrobe|wash the windows|tidy the attic|sort the books",
    "device": "laptop|phone|washing machine|bike|heater|printer|watch|kettle|radio|oven|dishwasher|scooter",
}

HELLO = (
    "?B [hi|hey|hello|good morning] {a}[!|, how are you?|, all well?|, what's up?|, nice to hear from you]"
)
START = "[hi {b}, |hey {b}! |{b}, |hello {b}, |]"
BYE = [
    "?* [great|perfect|wonderful|super][, thanks|, bye|]!",
    "?* [see you then|bye|take care|see you] [:)|😀|]",
]

# One line is one turn: the speaker (? before it: not always said; *: not the last one's), then the words.
SCENARIOS = {
    "meet": {
        "turns": [
            [
                HELLO,
                "A " + START + "[do you want to|would you like to|shall we] {do} [with me |]on {day}?",
                "B [sure|yes, gladly|oh yes|good idea]! [where|where do we meet]?",
                "A [let's meet at|how about|I'd say] {place}[, at {time}|, {time}|. is {time} ok]?",
                "B [{time} is fine|{time} works|ok, {time}|fine, I'll be there at {time}]",
                *BYE,
            ],
            [
                HELLO,
                "A " + START + "[how about we|why don't we|I'd love to] {do} on {day2}[?|!]",
                (
                    "B [sorry, {day2} is bad|I can't on {day2}|{day2} won't work]. [but {day} is free|what "
                    "about {day}|{day}]?"
                ),
                "A [{day} is ok|ok, {day}|{day} then]. [at {time}|say {time}]?",
                "B [good|fine|yes], {time}[. I'll wait at|. let's meet at| at] {place}",
                *BYE,
            ],
        ],
        "summary": [
            "{a} and {b} will {do} on {day}. They will meet at {place} at {time}.",
            "{a} and {b} will meet at {place} on {day} at {time} to {do}.",
            "On {day}, {a} and {b} want to {do}. They will meet at {time} at {place}.",
            "{a} asks {b} to {do}. They agree to meet on {day} at {time} at {place}.",
        ],
    },
    "borrow": {
        "turns": [
            [
                HELLO,
                "A "
                + START
                + "[do you still have|do you own] a {item}? "
                + "[I need one|I could use one] [on {day}|for {day}]",
                "B [yes|I do|sure], [it's in the cellar|nobody uses it|do you want it?]",
                "A [may I borrow it|can you lend it to me|could I have it for a while]?",
                (
                    "B [of course|no problem|sure], [come to|I'll bring it to|you can get it at] {place} [on "
                    "{day} |]at {time}"
                ),
                *BYE,
            ],
            [
                HELLO,
                "A " + START + "[can I borrow|could you lend me] [your|a] {item}?",
                "B [sure|yes]. [when do you need it|by when]?",
                "A [on {day}|{day}], [if possible|if that's ok]",
                "?B [what are you up to|what for]?",
                "?A [long story|you'll see|nothing special]",
                "B [fine, meet me at|ok, I'm at|then come to] {place} at {time}[, I'll have it with me|]",
                *BYE,
            ],
        ],
        "summary": [
            "{a} wants to borrow a {item} from {b}. {a} will get it at {place} on {day} at {time}.",
            "{b} will lend {a} a {item}. They will meet at {place} on {day} at {time}.",
            "{a} needs a {item} on {day}. {b} will lend it to {a} at {place} at {time}.",
        ],
    },
    "shopping": {
        "turns": [
            [
                HELLO,
                "A " + START + "[are you still in town|are you at the shop|where are you]?",
                "B [yes, why?|at {place}|I'm at {place}, why?]",
                "A [we need|could you get|please bring] {food} and {food2}[, the fridge is empty|, please|]",
                "B [ok|will do|sure], {food} and {food2}. [I'll be home at|home at|expect me at] {time}",
                *BYE,
            ],
            [
                HELLO,
                "A "
                + START
                + "[I'm cooking tonight|we are out of {food}|there is no {food} left]. "
                + "[can you|could you] shop?",
                "B [sure|ok], [what do we need|what shall I buy]?",
                "A {food} and {food2}[, that's all|, please|]",
                "?B [not {food3}|no {food3}]?",
                "?A [no, still enough of that|no, we have {food3}]",
                "B [got it|ok]. [I'll be back at|I'm home at|should be there at] {time}",
                *BYE,
            ],
        ],
        "summary": [
            "{a} asks {b} to buy {food} and {food2}. {b} will be home at {time}.",
            "{b} will buy {food} and {food2} for {a} and be home at {time}.",
            "{a} needs {food} and {food2}. {b} will buy them and come home at {time}.",
        ],
    },
    "move": {
        "turns": [
            [
                HELLO,
                "A " + START + "[bad news|I'm so sorry], I can't {do} on {day2}. I've got {reason}",
                "B [oh no|what a pity|that's ok|poor you]. [another day|shall we move it|when then]?",
                "A [what about|is|how about] {day}[, {time}|, at {time}| at {time}]?",
                "B {day} [is fine|works|suits me][, {time} it is|, see you at {time}|]",
                *BYE,
            ],
            [
                HELLO,
                "B " + "[are we still going to|do we still] {do} on {day2}?",
                "A [no, I have|I can't, I've got|sorry, I have] {reason}",
                "B [get well soon|never mind|ok, no problem]. {day} [instead|then]?",
                "A [yes, {day} is better|{day} is good|I can do {day}], [at {time}|{time}]?",
                "B [{time} is ok|agreed, {time}|ok, {time}]",
                *BYE,
            ],
        ],
        "summary": [
            "{a} can't {do} with {b} on {day2} because of {reason}. They will do it on {day} at {time}.",
            "{a} has {reason} and can't {do} on {day2}. {a} and {b} move it to {day} at {time}.",
            "Because of {reason}, {a} can't {do} with {b} on {day2}. They agree on {day} at {time}.",
        ],
    },
    "gift": {
        "turns": [
            [
                HELLO,
                "A " + START + "{c} has a birthday on {day}. [what do we give|any idea for a present]?",
                "B [a {gift2}|maybe a {gift2}]?",
                "A [{c} has got one|no, too boring|we did that last year]. [rather|what about] a {gift}",
                "B [a {gift} is perfect|yes, a {gift}|good, a {gift}]. [who buys it|shall I buy it]?",
                "A [I will|let me do it], [there is a shop at|near|I'm at] {place} [anyway|tomorrow]",
                *BYE,
            ],
            [
                HELLO,
                "A "
                + START
                + "[what shall we give {c}|do you know what {c} wants] [on {day}|for the party on {day}]?",
                "B [{c} wants|I thought of|how about] a {gift}[ :)|]",
                "A [nice|lovely|great idea]! [where do you get one|where can I buy it]?",
                "B [at|in the shop at|they sell them at] {place}. [will you go|can you get it]?",
                "A [yes, I'll buy it|ok, I'll get it|sure, I'll go]",
                *BYE,
            ],
        ],
        "summary": [
            "{a} and {b} want to give {c} a {gift} on {day}. {a} will buy it at {place}.",
            "{c} will get a {gift} from {a} and {b} on {day}. {a} will buy it at {place}.",
            "{a} will buy a {gift} at {place}. {a} and {b} will give it to {c} on {day}.",
        ],
    },
    "ride": {
        "turns": [
            [
                HELLO,
                "A " + START + "[are you driving to|do you go to] {place} on {day}?",
                "B [yes|I am|I think so], [why|do you need a lift|want to come]?",
                (
                    "A [my {device} is broken|I've missed the last bus before|I have a heavy bag]. [can you "
                    "take me|room for me]?"
                ),
                "B [sure|of course|there is room], [I'll pick you up at|be ready at|I come by at] {time}",
                *BYE,
            ],
            [
                HELLO,
                "A "
                + START
                + "I [have to|must] be at {place} on {day}. [could you drive me|can I get a lift]?",
                "B [when|at what time]? [{time2}|at {time2}]?",
                (
                    "A [{time2} is too late|a bit earlier|rather {time}], [{time} please|please at {time}|"
                    "{time}]"
                ),
                "B [ok|fine], [I'll get you at {time}|{time} is ok|I'll be at your door at {time}]",
                *BYE,
            ],
        ],
        "summary": [
            "{b} will drive {a} to {place} on {day}. {b} will pick {a} up at {time}.",
            "{a} needs a lift to {place} on {day}. {b} will pick {a} up at {time}.",
            "On {day}, {b} will give {a} a lift to {place}. {a} will be picked up at {time}.",
        ],
    },
    "help": {
        "turns": [
            [
                HELLO,
                "A " + START + "[could you help me to|I need help to|can you help me] {chore}?",
                "B [sure|gladly|yes]. when?",
                "A [on {day}|{day}][, at {time}|, around {time}]?",
                "B [{day} is good|ok, {day}], [{time}|at {time}]. [shall I bring|do you need] a {item}?",
                "A [yes please|oh yes|good idea, yes][, mine is broken|, I have none|]",
                *BYE,
            ],
            [
                HELLO,
                "A " + START + "I [have to|want to] {chore} on {day2}, [any chance you help|are you free]?",
                "B [not on {day2}|{day2} is full|on {day2} I have {reason}]. {day}?",
                "A {day} [is fine too|is ok|works]. [please bring|do you have|have you got] a {item}?",
                (
                    "B [yes, I'll bring it|I have one|sure, I'll take it along]. [I'll come at|see you at|"
                    "say] {time}"
                ),
                *BYE,
            ],
        ],
        "summary": [
            "{b} will help {a} to {chore} on {day} at {time}. {b} will bring a {item}.",
            "{a} asks {b} for help to {chore}. {b} will come on {day} at {time} and bring a {item}.",
            "On {day} at {time}, {b} will bring a {item} and help {a} to {chore}.",
        ],
    },
    "repair": {
        "turns": [
            [
                HELLO,
                "A " + START + "my {device} [is broken|stopped working|makes strange noises] [again|]",
                (
                    "B [oh no|not again|how annoying]! [do you know|have you asked] {c}? {c} [repairs such "
                    "things|can fix it]"
                ),
                "A [really|no]? [where|where is that]?",
                "B [at|in a workshop at|right next to] {place}, [open on|ask on|I'm there on] {day}",
                "A [good, I'll go there|thanks, I'll take it there|then I'll bring it] [on {day}|]",
                *BYE,
            ],
            [
                HELLO,
                "A "
                + START
                + "[who repaired your {device}|who can repair a {device}]? [mine is dead|mine just died]",
                "B {c} [did|can do it]. [very cheap|took an hour|honest work]",
                "?A [sounds good|that's what I need]. [where|where do I go]?",
                "B [the workshop is at|go to|you find it at] {place}",
                "A [ok, I'll take it there on {day}|I'll go on {day}|{day} is my free day, I'll go then]",
                *BYE,
            ],
        ],
        "summary": [
            "{a}'s {device} is broken. {a} will take it to {c} at {place} on {day}.",
            "{b} tells {a} that {c} repairs things. {a} will take the {device} to {place} on {day}.",
            "On {day}, {a} will take a broken {device} to {c} at {place}, as {b} suggests.",
        ],
    },
}


def expand(rng: random.Random, template: str, slots: dict[str, str]) -> str:
    """One reading of a template: a choice of every [x|y], innermost first, and the words of `slots`."""
    while "[" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda choice: rng.choice(choice[1].split("|")), template)
    return template.format_map(slots).strip()


def topic_words(rng: random.Random, topic: str) -> dict[str, str]:
    """Words of a topic for the slots of one sentence."""
    words = {"kin": rng.choice(KIN.split("|"))}
    for slot, choices in TOPICS[topic].items():
        words[slot], words[f"{slot}2"] = rng.sample(choices.split("|"), 2)
    return words


def make_post(rng: random.Random, topic: str) -> str:
    """A post of 25 to 70 words: topical sentences, shared ones, in every other post one of another topic."""
    while True:
        others = [other for other in TOPICS if other != topic]
        plan = [(text, topic) for text in rng.sample(TOPICAL, rng.choice([1, 2, 2, 3]))]
        plan += [(text, topic) for text in rng.sample(SHARED, rng.randint(1, 3))]
        plan += [(rng.choice(ASIDES), rng.choice(others))] * rng.randint(0, 1)
        rng.shuffle(plan)
        sentences = (expand(rng, text, topic_words(rng, source)) for text, source in plan)
        post = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
        if 25 <= len(post.split()) <= 70:
            return post


def draw_slots(rng: random.Random) -> dict[str, str]:
    """The facts of one dialogue: three people, and for each slot what is agreed on and two alternatives."""
    slots = dict(zip("abc", rng.sample(NAMES.split("|"), 3), strict=True))
    for slot, choices in SLOTS.items():
        slots[slot], slots[f"{slot}2"], slots[f"{slot}3"] = rng.sample(choices.split("|"), 3)
    return slots


def speak(rng: random.Random, turns: list[str], slots: dict[str, str]) -> str:
    """A dialogue of 4 to 8 turns, one a line, from the turns of a scenario."""
    said = [turn.lstrip("?") for turn in turns if not turn.startswith("?") or rng.random() < 0.5]
    lines, speaker = [], ""
    for turn in said[:8]:
        speaker = {"A": "a", "B": "b", "*": "a" if speaker == "b" else "b"}[turn[0]]
        words = expand(rng, turn[2:], slots)
        # Half of the chatters care for capital letters.
        words = words[0].upper() + words[1:] if rng.random() < 0.5 else words
        lines.append(f"{slots[speaker]}: {words}")
    return "\n".join(lines)


def tellable(templates: list[str], dialogue: str, slots: dict[str, str]) -> list[str]:
    """Those templates whose every fact was said in the dialogue: the turns leave some out at times."""
    said = {slot for slot, fact in slots.items() if re.search(rf"\b{re.escape(fact)}\b", dialogue)}
    return [template for template in templates if said.issuperset(re.findall(r"{(\w+)}", template))]


def make_dialogue(rng: random.Random) -> tuple[str, str, dict[str, str]]:
    """A scenario's name, a dialogue of it that can be summed up, and its facts."""
    while True:
        scenario, slots = rng.choice(list(SCENARIOS)), draw_slots(rng)
        dialogue = speak(rng, rng.choice(SCENARIOS[scenario]["turns"]), slots)
        if tellable(SCENARIOS[scenario]["summary"], dialogue, slots):
            return scenario, dialogue, slots


def make_posts(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Different posts, of every class equally many, in random order."""
    posts, labels = {}, list(TOPICS)
    while len(posts) < count:
        label = labels[len(posts) % len(labels)]
        posts[make_post(rng, label)] = label
    rows = [{"text": text, "label": label} for text, label in posts.items()]
    rng.shuffle(rows)
    return rows


def make_dialogues(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Different dialogues with one summary each."""
    rows = {}
    while len(rows) < count:
        scenario, dialogue, slots = make_dialogue(rng)
        summary = rng.choice(tellable(SCENARIOS[scenario]["summary"], dialogue, slots))
        rows[dialogue] = expand(rng, summary, slots)
    return [
        {"id": f"{number:04}", "dialogue": dialogue, "summary": summary}
        for number, (dialogue, summary) in enumerate(rows.items(), start=1)
    ]


def write_splits(name: str, rows: list[dict[str, str]], sizes: dict[str, int]) -> None:
    """Cuts `rows` into the files of the splits."""
    start = 0
    for split, size in sizes.items():
        path = FOLDER / f"{name}_{split}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) for row in rows[start : start + size])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{path}: {size} rows, {path.stat().st_size:,} bytes")
        start += size


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_splits("posts", make_posts(random.Random(SEED), sum(POSTS.values())), POSTS)
    write_splits("dialogues", make_dialogues(random.Random(SEED + 1), sum(DIALOGUES.values())), DIALOGUES)


if __name__ == "__main__":
    main()
